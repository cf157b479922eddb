"""Rows of several turns in the learner: what the student read between its completions is read and nothing else."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.contracts.metrics import report
from cluster.contracts.trajectory import make_generated, masked
from learner.batching.micro_batch import build_micro_batch, trajectories
from learner.engines.torch import ReferenceEngine
from learner.loss.objective import Objective
from learner.model.student import load_student
from tests.builders import make_trajectory
from tests.learner.support import OBJECTIVES, ROUTE, VOCABULARY, WholeStep, measure_gradient, own_heads, score_by

MASKS = ("0011100110", "01101", "0001110000110001")  # 1: sampled; 0: the prompt and what tools returned


def rows_with_tools(*further: object) -> pa.RecordBatch:
    """Return rows of several turns."""
    random = np.random.default_rng(3)
    rows = []
    for index, mask in enumerate(MASKS):
        loss_mask = np.array(list(mask), np.uint8)
        count = int(loss_mask.sum())
        rows.append(
            make_trajectory(
                trajectory_id=index,
                teacher=ROUTE,
                token_ids=random.integers(2, VOCABULARY, len(mask)).astype(np.int32),
                loss_mask=loss_mask,
                rollout_logprobs=np.full(count, -1, np.float32),
                candidate_ids=None,
            )
        )
    return make_generated([*rows, *further])


@pytest.mark.parametrize("name", ["sampled", "topk", "full"])
def test_with_tool_text_in_between_a_student_that_is_its_own_teacher_has_no_loss_and_no_gradient(make_config, name):
    engine = ReferenceEngine(load_student(make_config().student, make_config().learner), make_config().learner)
    own = score_by(engine.student.causal_lm, OBJECTIVES[name], rows_with_tools())
    rows = trajectories([own])
    batch = build_micro_batch(((0, 1), (2,)), rows, seed=0)
    num_tokens = sum(mask.count("1") for mask in MASKS)
    assert len(batch.tokens) == num_tokens
    task = WholeStep(Objective(OBJECTIVES[name]), num_tokens, own_heads(engine.student.causal_lm, OBJECTIVES[name]))
    metrics = report(measure_gradient(engine, [batch], task))
    assert abs(metrics["loss"]) < 1e-5
    assert metrics["gradient_norm"] < 1e-5


def test_the_head_sees_only_the_rows_that_predict_sampled_tokens_and_the_others_would_change_nothing(make_config):
    student = load_student(make_config().student, make_config().learner)
    own = score_by(student.causal_lm, OBJECTIVES["sampled"], rows_with_tools())
    batch = build_micro_batch(((0,), (1,), (2,)), trajectories([own]), seed=0)
    # Completions stand at these places of their rows; the state one to the left predicts each.
    width = batch.input_ids.shape[1]
    expected = [
        row * width + place - 1 for row, mask in enumerate(MASKS) for place, one in enumerate(mask) if one == "1"
    ]
    assert batch.predicting.tolist() == expected
    with torch.no_grad():
        whole = student.causal_lm(input_ids=batch.input_ids[:1, : len(MASKS[0])]).logits[0]
    objective, count = Objective(OBJECTIVES["sampled"]), MASKS[0].count("1")
    tokens = batch.tokens[:count]
    picked = objective.evaluate(
        whole[batch.predicting[:count]].clone(), tokens, objective.plan(tokens, None), {}, with_gradient=True
    )
    # The gradient by the logits of the places where the student read has no entry at all.
    assert picked.logits_gradient.shape == (count, whole.shape[1])
    torch.testing.assert_close(picked.logprobs, tokens.logprobs["teacher"], rtol=0, atol=1e-4)


def test_a_row_whose_environment_failed_adds_nothing_to_a_step(make_config):
    engine = ReferenceEngine(load_student(make_config().student, make_config().learner), make_config().learner)
    failed = masked(make_trajectory((5, 6), (7, 8), trajectory_id=9, teacher=ROUTE))
    failed = replace(failed, finish_reason="environment_error")
    results = []
    for further in ((), (failed,)):
        own = score_by(engine.student.causal_lm, OBJECTIVES["sampled"], rows_with_tools(*further))
        # A teacher that differs from the student, so that there is something to learn.
        place = own.schema.get_field_index("teacher_logprobs")
        offsets = own["teacher_logprobs"].offsets
        shifted = pa.ListArray.from_arrays(offsets, pa.array(own["teacher_logprobs"].values.to_numpy() - 0.5))
        own = own.set_column(place, own.schema.field(place), shifted)
        rows = trajectories([own])
        batch = build_micro_batch(tuple((index,) for index in range(len(rows))), rows, seed=0)
        task = WholeStep(Objective(OBJECTIVES["sampled"]), len(batch.tokens), {})
        results.append(report(measure_gradient(engine, [batch], task)))
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-6)
    assert results[0]["gradient_norm"] == pytest.approx(results[1]["gradient_norm"], rel=1e-5)
    assert abs(results[0]["gradient_norm"]) > 1e-3
