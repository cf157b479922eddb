"""The student's packed forward against the plain forward of transformers."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereForCausalLM,
    Gemma2ForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from cluster.config.sections import StudentConfig
from cluster.config.stages import LearnerConfig
from cluster.contracts.errors import ModelError
from learner.batching.micro_batch import build_micro_batch, trajectories
from learner.batching.plan import plan_step
from learner.loss.tokens import Evaluation
from learner.model.projection import LogitScaling
from learner.model.student import HOST, check_forward, first_layers, load_student
from tests.learner.support import SMALL, VOCABULARY

FP32 = LearnerConfig(dtype="float32")


def logprobs_alone(causal_lm, row):
    """Return log-probabilities [completion_tokens, vocabulary] of one trajectory in a forward of its own."""
    ids = torch.from_numpy(row.token_ids.copy()).long()
    logits = causal_lm(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    return logits[:-1][torch.from_numpy(row.loss_mask[1:] != 0)]


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_no_trajectory_sees_another_of_its_grid(student_folder, scored, is_training, gradient_checkpointing):
    config = LearnerConfig(dtype="float32", gradient_checkpointing=gradient_checkpointing)
    student = load_student(StudentConfig(model=str(student_folder)), config)
    student.train(is_training)
    reference = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
    rows = trajectories([scored])
    (grids,) = plan_step([len(row.token_ids) for row in rows], 1, micro_batch_tokens=96)
    assert max(len(row) for grid in grids for row in grid) > 1, "the plan must pack several trajectories into a row"
    for grid in grids:
        batch = build_micro_batch(grid, rows, seed=0)
        found = Evaluation(*student(batch))
        expected = torch.cat([logprobs_alone(reference, rows[index]) for row in grid for index in row])
        of_written = expected.gather(-1, batch.tokens.target_ids[:, None])[:, 0]
        torch.testing.assert_close(found.logprobs, of_written, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.entropy, -(expected.exp() * expected).sum(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (LlamaForCausalLM, {"tie_word_embeddings": False}),
        (Gemma2ForCausalLM, {"final_logit_softcapping": 2.0}),
        (CohereForCausalLM, {"logit_scale": 0.3}),
        (GraniteForCausalLM, {"logits_scaling": 3.0}),
    ],
)
def test_models_that_treat_their_logits_specially_pass_the_forward_check(model, settings, tmp_path):
    model(model.config_class(**SMALL, **settings)).save_pretrained(tmp_path)
    load_student(StudentConfig(model=str(tmp_path)), FP32)


def test_the_cap_of_attention_counts(tmp_path):
    """transformers' "sdpa" ignores it."""
    settings = {"attn_logit_softcapping": 0.2, "query_pre_attn_scalar": 1, "final_logit_softcapping": None}
    Gemma2ForCausalLM(Gemma2ForCausalLM.config_class(**SMALL, **settings)).save_pretrained(tmp_path)
    ids = torch.arange(1, 20)[None]
    capped, ignored = (
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)(input_ids=ids).logits
        for name in ("eager", "sdpa")
    )
    found = load_student(StudentConfig(model=str(tmp_path)), FP32).causal_lm(input_ids=ids).logits
    assert (capped - ignored).abs().max() > 1e-2
    torch.testing.assert_close(found, capped, atol=1e-5, rtol=0)


def test_a_forward_that_scales_its_logits_in_an_unknown_way_is_refused_in_one_sentence(student_folder):
    student = load_student(StudentConfig(model=str(student_folder)), FP32)
    student.head.scaling = LogitScaling(factor=2.0)
    with pytest.raises(ModelError, match="two packed sequences differ by") as error:
        check_forward(student, "tiny")
    assert "\n" not in str(error.value)


SHARDED = LearnerConfig(dtype="float32", zero_stage=3)


def test_a_rank_that_reads_no_weights_has_the_same_parameters_and_buffers(student_folder):
    """ZeRO stage 3 sends it the values of rank 0."""
    read, unread = (load_student(StudentConfig(str(student_folder)), SHARDED, HOST, reads) for reads in (True, False))
    shapes = [{name: (one.shape, one.dtype) for name, one in student.named_parameters()} for student in (read, unread)]
    assert shapes[0] == shapes[1]
    assert not any(one.is_meta for one in (*unread.parameters(), *unread.buffers()))
    buffers = [{name: (one.shape, one.dtype) for name, one in student.named_buffers()} for student in (read, unread)]
    assert buffers[0] == buffers[1] != {}
    assert unread.head.weight is unread.causal_lm.get_input_embeddings().weight  # tied
    assert unread.manifest("float32") == read.manifest("float32")


def test_a_model_that_is_sharded_is_checked_by_its_first_layers(tmp_path):
    """Gemma 2 attends within a window in every second layer; five more layers are like the first two."""
    model = Gemma2ForCausalLM(Gemma2ForCausalLM.config_class(**{**SMALL, "num_hidden_layers": 7}))
    whole = model.model.layers
    with first_layers(model):
        assert list(model.model.layers) == list(whole)[:2]
    assert model.model.layers is whole
    settings = {**SMALL, "num_hidden_layers": 6, "num_experts": 4, "moe_intermediate_size": 8}
    mixed = Qwen3MoeConfig(**settings, mlp_only_layers=[0, 1, 2])
    experts = Qwen3MoeForCausalLM(mixed)
    with first_layers(experts):
        assert len(experts.model.layers) == 4  # the first with experts is the fourth
    # Its logits are scaled by a number that the learner does not know of.
    granite = GraniteForCausalLM(GraniteForCausalLM.config_class(**SMALL, logits_scaling=3.0))
    granite.save_pretrained(tmp_path)
    student = load_student(StudentConfig(str(tmp_path)), SHARDED)
    student.head.scaling = LogitScaling()
    with first_layers(student.causal_lm), pytest.raises(ModelError, match="two packed sequences differ by"):
        check_forward(student, "granite")


class Rounding:
    """Stands for a student whose packed forward gives every probe token 0.66 nats more than its own forward alone."""

    head, kernel = SimpleNamespace(weight=torch.zeros(VOCABULARY, 4, dtype=torch.bfloat16)), None

    def __init__(self, logprob):
        self.logprob, self.causal_lm = logprob, self.alone

    def eval(self):
        pass

    def alone(self, input_ids, use_cache):
        others = math.log((1 - math.exp(self.logprob)) / (VOCABULARY - 1))
        logits = torch.full((1, input_ids.shape[1], VOCABULARY), others)
        logits[0, torch.arange(input_ids.shape[1] - 1), input_ids[0, 1:]] = self.logprob
        return SimpleNamespace(logits=logits)

    def __call__(self, batch):
        return torch.zeros(()), *[torch.full((len(batch.tokens),), self.logprob + 0.66)] * 4


def test_rounding_of_an_unlikely_token_is_no_fault_in_bfloat16():
    check_forward(Rounding(-22.9), "rounding")  # up to 0.25 x (1 + 22.9 / 8) = 0.97 nats
    with pytest.raises(ModelError, match=r"differ by 0\.66"):
        check_forward(Rounding(-1.0), "rounding")  # up to 0.25 x (1 + 1 / 8) = 0.28


def test_a_model_without_attention_is_refused_in_one_sentence(tmp_path):
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot load its weights") as error:
        load_student(StudentConfig(model=str(tmp_path)), FP32)
    assert "\n" not in str(error.value)


def test_a_missing_directory_is_one_sentence(tmp_path):
    with pytest.raises(ModelError, match="no such directory") as error:
        load_student(StudentConfig(model=str(tmp_path / "absent")), FP32)
    assert "\n" not in str(error.value)


def test_a_directory_without_weights_is_one_sentence(student_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((student_folder / "config.json").read_bytes())
    with pytest.raises(ModelError, match="cannot load its weights") as error:
        load_student(StudentConfig(model=str(tmp_path)), FP32)
    assert "\n" not in str(error.value)


def test_truncated_weights_are_one_sentence(student_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((student_folder / name).read_bytes()[:20_000])
    with pytest.raises(ModelError, match="cannot load its weights") as error:
        load_student(StudentConfig(model=str(tmp_path)), FP32)
    assert "\n" not in str(error.value)


def test_dropout_of_the_configuration_is_off(tmp_path):
    Qwen3ForCausalLM(Qwen3Config(**SMALL, attention_dropout=0.5)).save_pretrained(tmp_path)
    student = load_student(StudentConfig(model=str(tmp_path)), FP32)
    assert student.training
    assert student.causal_lm.model.layers[0].self_attn.attention_dropout == 0


def test_the_manifest_names_tied_parameters_once(student_folder: Path):
    manifest = load_student(StudentConfig(model=str(student_folder)), FP32).manifest("bfloat16")
    names = [tensor.name for tensor in manifest]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert len(names) == len(set(names))
