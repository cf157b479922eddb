"""One process of plain torch: micro-batching, self-distillation, metrics."""

import msgspec
import numpy as np
import pytest
import torch

from cluster.contracts.config import ObjectiveConfig
from cluster.contracts.metrics import merge, report
from cluster.contracts.trajectory import ragged
from learner.micro_batch import build_micro_batch, trajectories
from learner.model import load_student
from learner.packing import plan_step
from learner.reference_engine import ReferenceEngine
from learner.train_step import accumulate, measure_gradient, train_step
from tests.learner.support import TOP_K, score_by

DIVERGENCES = ["sampled_reverse_kl", "reverse_kl", "forward_kl", "jsd"]


def make_engine(config):
    return ReferenceEngine(load_student(config.student, config.learner), config.learner)


def plan_batches(batch, micro_batch_tokens, ranks=1):
    rows = trajectories([batch])
    plan = plan_step([len(row.token_ids) for row in rows], ranks, micro_batch_tokens)
    return [[build_micro_batch(grid, rows, TOP_K) for grid in grids] for grids in plan.ranks]


def completion_tokens(batch):
    return int(ragged(batch, "rollout_logprobs").lengths.sum())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_size_of_micro_batches_changes_nothing(make_config, scored, divergence):
    results = []
    for micro_batch_tokens in (50, 100, 1000):
        engine = make_engine(make_config())
        (batches,) = plan_batches(scored, micro_batch_tokens)
        figures = report(accumulate(engine, batches, ObjectiveConfig(divergence), completion_tokens(scored)))
        results.append((len(batches), figures["loss"], [parameter.grad for parameter in engine.student.parameters()]))
    assert [micro_batches for micro_batches, _, _ in results] == [5, 2, 1]
    for _, loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][1], abs=1e-6)
        torch.testing.assert_close(gradients, results[0][2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_is_its_own_teacher_has_no_loss_and_no_gradient(make_config, scored, divergence):
    engine = make_engine(make_config())
    own = score_by(engine.student.causal_lm, scored)
    (batches,) = plan_batches(own, 64)
    metrics = report(measure_gradient(engine, batches, ObjectiveConfig(divergence), completion_tokens(own)))
    assert abs(metrics["loss"]) < 1e-5
    assert metrics["gradient_norm"] < 1e-5
    assert abs(metrics["kl"]) < 1e-5
    assert metrics["sampler_learner_gap"] < 1e-5
    assert metrics["importance_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["student_topk_mass"] == pytest.approx(metrics["teacher_topk_mass"], abs=1e-5)


def test_training_on_the_same_batch_brings_the_student_closer_to_the_teacher(make_config, scored):
    engine = make_engine(make_config())
    (batches,) = plan_batches(scored, 128)
    losses = [
        report(train_step(engine, batches, ObjectiveConfig("forward_kl"), completion_tokens(scored), 3e-3))["loss"]
        for _ in range(8)
    ]
    assert losses[-1] < 0.8 * losses[0]


def test_measuring_leaves_the_weights_and_the_next_step_alone(make_config, scored):
    (batches,) = plan_batches(scored, 128)
    measured, plain = make_engine(make_config()), make_engine(make_config())
    objective, tokens = ObjectiveConfig("jsd"), completion_tokens(scored)
    measure_gradient(measured, batches, objective, tokens)
    train_step(measured, batches, objective, tokens, 1e-3)
    train_step(plain, batches, objective, tokens, 1e-3)
    torch.testing.assert_close(measured.student.state_dict(), plain.student.state_dict(), atol=0, rtol=0)


def test_figures_are_means_over_completion_tokens(make_config, scored):
    engine = make_engine(make_config())
    (batches,) = plan_batches(scored, 64)
    objective = ObjectiveConfig("sampled_reverse_kl")
    metrics = report(measure_gradient(engine, batches, objective, completion_tokens(scored)))
    own = ragged(score_by(engine.student.causal_lm, scored), "teacher_logprobs").values
    rollout, teacher = ragged(scored, "rollout_logprobs").values, ragged(scored, "teacher_logprobs").values
    assert metrics["kl"] == pytest.approx((own - teacher).mean(), abs=1e-5)
    assert metrics["sampler_learner_gap"] == pytest.approx(np.abs(own - rollout).mean(), abs=1e-5)
    assert metrics["importance_max"] == pytest.approx(np.exp(own - rollout).max(), rel=1e-4)
    assert metrics["loss"] == pytest.approx((np.exp(own - rollout) * (own - teacher)).mean(), abs=1e-5)
    mass = np.exp(ragged(scored, "teacher_topk_logprobs").values).sum(-1).mean()
    assert metrics["teacher_topk_mass"] == pytest.approx(mass, abs=1e-5)


def test_figures_of_two_ranks_merge_into_those_of_one(make_config, scored):
    engine = make_engine(make_config())
    objective, tokens = ObjectiveConfig("reverse_kl"), completion_tokens(scored)
    ((whole,),) = plan_batches(scored, 1000)
    shares = plan_batches(scored, 64, ranks=2)
    parts = [measure_gradient(engine, share, objective, tokens) for share in shares]
    of_one = report(measure_gradient(engine, [whole], objective, tokens))
    merged = report(merge(parts))
    for name in ("loss", "kl", "entropy", "importance_mean", "importance_max", "importance_p99", "teacher_topk_mass"):
        assert merged[name] == pytest.approx(of_one[name], abs=1e-5), name


def test_a_step_without_completion_tokens_changes_no_weight(make_config):
    engine = make_engine(make_config("learner.weight_decay=0.0"))
    before = {name: value.clone() for name, value in engine.student.state_dict().items()}
    empty = build_micro_batch((), [], TOP_K)
    metrics = report(train_step(engine, [empty], ObjectiveConfig("reverse_kl"), 0, 1e-3))
    assert metrics["gradient_norm"] == 0
    torch.testing.assert_close(engine.student.state_dict(), before, atol=0, rtol=0)


def test_a_gradient_above_the_limit_is_scaled_down_to_it(make_config, scored):
    config = make_config()
    (batches,) = plan_batches(scored, 1000)
    objective, tokens = ObjectiveConfig("reverse_kl"), completion_tokens(scored)
    limited = msgspec.structs.replace(config.learner, max_gradient_norm=1e-3, epsilon=1.0)
    engine = ReferenceEngine(load_student(config.student, limited), limited)
    parameters = list(engine.student.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    train_step(engine, batches, objective, tokens, 1.0)
    # With epsilon 1 far above the gradient, AdamW's first step is the clipped gradient itself.
    moved = torch.cat([(parameter - old).flatten() for parameter, old in zip(parameters, before, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=0.01)
