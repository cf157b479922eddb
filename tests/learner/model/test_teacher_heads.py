"""Which heads a rank reads, and for which route."""

import torch
from transformers import AutoModelForCausalLM

from learner.model.completion_head import load_teacher_heads

CPU = torch.device("cpu")


def test_objectives_that_list_their_tokens_need_no_heads(make_config):
    assert load_teacher_heads(make_config("objective.support=topk"), CPU) == {}


def test_every_route_has_the_heads_of_the_models_in_its_target(make_config, student_folder, wide_folder):
    config = make_config(
        "objective.preset=beta-opsd",
        "teachers.only.engine.dtype=float32",
        f"teachers.wide.model={wide_folder}",
        "teachers.wide.engine.dtype=float32",
    )
    heads = load_teacher_heads(config, CPU)
    assert {route: sorted(models) for route, models in heads.items()} == {
        "only": ["initial_student", "teacher"],
        "wide": ["initial_student", "teacher"],
    }
    for folder, head in ((student_folder, heads["only"]["teacher"]), (wide_folder, heads["wide"]["teacher"])):
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_output_embeddings().weight
        assert torch.equal(head.weight, expected)
        assert not head.weight.requires_grad


def test_a_head_that_two_routes_share_is_read_once(make_config, wide_folder):
    config = make_config("objective.preset=beta-opsd", f"teachers.wide.model={wide_folder}")
    heads = load_teacher_heads(config, CPU)
    assert heads["only"]["initial_student"] is heads["wide"]["initial_student"]
