"""What each step requests: which prompts, under which seeds, and how they are sampled."""

import json
from pathlib import Path

from cluster.config.run_file import parse_run_config
from cluster.run.inputs import Inputs, held_out_requests, held_out_sampling, load_inputs, train_requests, train_sampling
from rollout_workers.prompts import PromptOrder, PromptSet
from tests.builders import make_config

EMBEDDED = Path(__file__).parents[3] / "cluster" / "embedded"
CONFIG = make_config("prompts.prompts_per_step=3", "rollout.samples_per_prompt=2", "evaluation.samples_per_prompt=2")
IN_ORDER = Inputs(
    PromptSet.of_token_ids([[1]] * 6, "main"), PromptOrder(4, seed=0, shuffle=False), (4, 5), max_model_len=8
)


def test_a_step_goes_on_with_the_prompt_after_the_last_one_of_the_step_before() -> None:
    requests = train_requests(CONFIG, IN_ORDER, step=1)
    assert [request.prompt_id for request in requests] == [3, 3, 0, 0, 1, 1]  # steps of 3, epochs of 4 prompts
    assert [request.trajectory_id for request in requests] == [6, 7, 8, 9, 10, 11]
    assert [request.sample_index for request in requests] == [0, 1] * 3


def test_no_two_trajectories_of_a_run_have_one_seed() -> None:
    # Eight steps ask every prompt six times, and the held-out ones are never among them.
    requests = [request for step in range(8) for request in train_requests(CONFIG, IN_ORDER, step)]
    requests += held_out_requests(CONFIG, IN_ORDER)
    assert len({request.seed for request in requests}) == len(requests) == 8 * 6 + 4


def test_held_out_prompts_follow_the_training_prompts_and_are_never_trained_on(tmp_path: Path) -> None:
    for name, count in (("train", 3), ("held_out", 2)):
        lines = [json.dumps({"prompt": f"{number} : 1 2 |"}) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    inputs = load_inputs(
        parse_run_config(
            f"""
            student.model = "{EMBEDDED}/student"
            teachers.main.model = "{EMBEDDED}/teacher"
            rollout.max_completion_tokens = 8
            [prompts]
            train = "{tmp_path}/train.jsonl"
            held_out = "{tmp_path}/held_out.jsonl"
            template = "raw"
            """
        )
    )
    assert inputs.held_out_ids == (3, 4)
    assert inputs.notes == ("warning: 2 of the 2 held-out prompts are training prompts too",)
    assert sorted(inputs.train.take(0, 6)) == [0, 0, 1, 1, 2, 2]


def test_evaluations_without_prompts_and_rewards_without_samples_are_said(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "1 : 1 2 |"}\n')
    run = ("prompts.template=raw", "rollout.max_completion_tokens=8", "evaluation.every_steps=5", "objective=opd-grpo")
    config = make_config(
        f"student.model={EMBEDDED}/student",
        f"teachers.main.model={EMBEDDED}/teacher",
        f"prompts.train={tmp_path}/p.jsonl",
        *run,
    )
    assert load_inputs(config).notes == (
        "warning: objective.terms.reward compares the samples of a prompt, and teaches nothing with "
        "rollout.samples_per_prompt = 1",
        "evaluation.every_steps is set, but nothing is evaluated: prompts.held_out names no prompts",
    )


def test_training_and_evaluation_sample_as_the_run_file_says() -> None:
    rollout = ("rollout.temperature=0.7", "rollout.top_p=0.9", "rollout.top_k=5")
    config = make_config(*rollout, "evaluation.temperature=0.5", "objective=exact-reverse-kl")
    sampling = train_sampling(config)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.9, 5)
    assert train_sampling(config, max_completion_tokens=7).max_completion_tokens == 7
    evaluation = held_out_sampling(config)
    assert (evaluation.temperature, evaluation.top_p, evaluation.top_k) == (0.5, 1.0, 0)
