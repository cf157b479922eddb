"""Every support of the objective through real pools: what arrives at the learner against transformers alone."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.config.run_config import Config
from cluster.contracts.batches import BatchHandle, ReadyBatches
from cluster.contracts.metrics import report
from cluster.contracts.trajectory import ragged
from cluster.contracts.wire import from_wire
from cluster.demo import EMBEDDED, embedded_config
from cluster.run.inputs import load_inputs, train_requests, train_sampling
from cluster.run.pools import Pipeline
from learner.batching.micro_batch import build_micro_batch, trajectories
from learner.batching.plan import plan_step
from learner.engines.torch import ReferenceEngine
from learner.loss.objective import Objective
from learner.model.completion_head import load_teacher_heads
from learner.model.student import load_student

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = ("prompts.prompts_per_step=8", "evaluation.num_prompts=8", "ray.dashboard=false")


def config_of(*overrides: str) -> Config:
    return embedded_config([*SMALL, *overrides])


@pytest.fixture(scope="module")
def student() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(EMBEDDED / "student", dtype=torch.float32)


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(EMBEDDED / "teacher", dtype=torch.float32)


def scored_by(pipeline: Pipeline, config: Config) -> list[BatchHandle]:
    requests = train_requests(config, load_inputs(config), step=0)
    written = pipeline.rollouts.generate(requests, train_sampling(config))
    return list(pipeline.teachers.score(written, config.scorers))


def batches_of(handles: Sequence[BatchHandle]) -> list[pa.RecordBatch]:
    return [from_wire(ray.get(handle.reference), "scored") for handle in handles]


def logits_of(model: PreTrainedModel, batch: pa.RecordBatch) -> torch.Tensor:
    """Return the logits that predict each completion token, rows in order: [completion_tokens, vocabulary]."""
    token_ids, loss_mask = ragged(batch, "token_ids"), ragged(batch, "loss_mask")
    rows = []
    for row in range(batch.num_rows):
        predicting = torch.from_numpy(np.flatnonzero(loss_mask[row]) - 1)
        ids = torch.from_numpy(token_ids[row].astype(np.int64))
        rows.append(model(input_ids=ids[None]).logits[0][predicting])
    return torch.cat(rows)


def gradients_of_learner(config: Config, batches: Sequence[pa.RecordBatch], num_tokens: int) -> dict[str, torch.Tensor]:
    """Return what the learner's own code computes of batches as they arrived, in one process of plain torch."""
    student = load_student(config.student, config.learner)
    rows = trajectories(batches, [0.0] * sum(batch.num_rows for batch in batches))
    ((grid,),) = plan_step([len(row.token_ids) for row in rows], num_ranks=1, micro_batch_tokens=1 << 20)
    micro_batch = build_micro_batch(grid, rows, config.run.seed)
    heads = load_teacher_heads(config, torch.device("cpu"))
    evaluated = ReferenceEngine(student, config.learner).forward(micro_batch, Objective(config.objective), heads)
    (evaluated.loss / num_tokens).backward()
    return {name: parameter.grad for name, parameter in student.causal_lm.named_parameters()}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def column(batch: pa.RecordBatch, name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(ragged(batch, name).values))


def test_the_exact_divergence_through_hidden_states_is_that_of_full_logits(
    pipeline: Pipeline, student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    config = config_of("objective.preset=exact-reverse-kl")
    handles = scored_by(pipeline, config)
    batches = batches_of(handles)
    num_tokens = sum(sum(handle.num_completion_tokens) for handle in handles)
    student.zero_grad()
    loss = torch.zeros(())
    for batch in batches:
        p, q = logits_of(student, batch).log_softmax(-1), logits_of(teacher, batch).log_softmax(-1).detach()
        loss = loss + (p.exp() * (p - q)).sum() / num_tokens
    loss.backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    norm = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in expected.values()])).item()

    found = report(pipeline.learner.measure_gradient(ReadyBatches(handles), config.objective))
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert found["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    for name, gradient in gradients_of_learner(config, batches, num_tokens).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("preset", ["sdpo", "async-opd"])
def test_candidates_of_the_student_are_scored_as_transformers_scores_them(
    pipeline: Pipeline, student: PreTrainedModel, teacher: PreTrainedModel, preset: str
) -> None:
    config = config_of(f"objective.preset={preset}")
    for batch in batches_of(scored_by(pipeline, config)):
        with torch.no_grad():
            p, q = logits_of(student, batch).log_softmax(-1), logits_of(teacher, batch).log_softmax(-1)
        ids, of_student = column(batch, "candidate_ids").long(), column(batch, "candidate_rollout_logprobs")
        assert ids.shape[1] == config.objective.needs.num_candidates
        assert_close(of_student, p.gather(-1, ids))
        assert_close(column(batch, "teacher_candidate_logprobs"), q.gather(-1, ids))
        if config.objective.support == "student_topk":
            assert_close(of_student, p.topk(ids.shape[1]).values)


def test_the_teacher_s_candidates_and_entropy_are_those_of_transformers(
    pipeline: Pipeline, teacher: PreTrainedModel
) -> None:
    config = config_of("objective.preset=eopd")
    for batch in batches_of(scored_by(pipeline, config)):
        with torch.no_grad():
            q = logits_of(teacher, batch).log_softmax(-1)
        best = q.topk(config.objective.support_size)
        assert_close(column(batch, "teacher_candidate_logprobs"), best.values)
        assert_close(column(batch, "teacher_entropy"), -(q.exp() * q).sum(-1))
