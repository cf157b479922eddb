"""One process of plain torch: micro-batching, self-distillation, metrics."""

import threading
import time
from dataclasses import replace

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from cluster.contracts.metrics import merge, report
from cluster.contracts.trajectory import ragged
from learner.batching.micro_batch import build_micro_batch, trajectories
from learner.batching.plan import plan_step
from learner.engines.torch import ReferenceEngine
from learner.loss.objective import Objective
from learner.model.student import load_student
from learner.train_step import accumulate, prefetched
from tests.learner.support import (
    LENGTHS,
    OBJECTIVES,
    SMALL,
    WholeStep,
    accumulate_all,
    advantages_of,
    completion_tokens,
    make_scored,
    measure_gradient,
    own_heads,
    random_heads,
    score_by,
    train_step,
)

HAS_OPTIMUM_AT_THE_TEACHER = [name for name in OBJECTIVES if name != "reward"]


def make_engine(config):
    return ReferenceEngine(load_student(config.student, config.learner), config.learner)


def plan_batches(batches, micro_batch_tokens, ranks=1):
    rows = trajectories(batches, advantages_of(batches))
    plan = plan_step([len(row.token_ids) for row in rows], ranks, micro_batch_tokens)
    return [[build_micro_batch(grid, rows, seed=0) for grid in grids] for grids in plan]


def task_of(name, num_tokens, heads=None):
    return WholeStep(Objective(OBJECTIVES[name]), num_tokens, heads or {})


def scored_for(name):
    """Return the batches of a step, its teacher heads and its completion tokens; `full` has two routes."""
    objective = OBJECTIVES[name]
    if name != "full":
        batches, heads = [make_scored(objective)], {}
    else:
        heads = random_heads(objective, {"narrow": 16, "wide": 48})
        batches = [
            make_scored(objective, LENGTHS[:3], "narrow", heads),
            make_scored(objective, LENGTHS[3:], "wide", heads, first_id=3),
        ]
    return batches, heads, sum(completion_tokens(batch) for batch in batches)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_size_of_micro_batches_changes_nothing(make_config, name):
    scored, heads, tokens = scored_for(name)
    results = []
    for micro_batch_tokens in (50, 100, 1000):
        engine = make_engine(make_config())
        (batches,) = plan_batches(scored, micro_batch_tokens)
        figures = report(accumulate_all(engine, batches, task_of(name, tokens, heads)))
        results.append((figures, torch.cat([parameter.grad.flatten() for parameter in engine.student.parameters()])))
    assert [figures["micro_batches"] for figures, _ in results] == [5, 2, 1]
    for figures, gradients in results[1:]:
        assert figures["loss"] == pytest.approx(results[0][0]["loss"], rel=1e-6, abs=1e-6)
        assert (gradients - results[0][1]).norm() < 3e-6 * max(1, results[0][1].norm().item())


def test_states_of_layers_and_their_gradients_are_the_same_packed_and_computed_again(make_config):
    scored, heads, tokens = scored_for("states")
    results = []
    for setting in ("attention=masked", "attention=grouped", "gradient_checkpointing=true"):
        engine = make_engine(make_config(f"learner.{setting}"))
        (batches,) = plan_batches(scored, 100)
        figures = report(accumulate_all(engine, batches, task_of("states", tokens, heads)))
        results.append((figures, torch.cat([parameter.grad.flatten() for parameter in engine.student.parameters()])))
    for figures, gradients in results[1:]:
        assert figures["loss"] == pytest.approx(results[0][0]["loss"], rel=1e-6)
        assert figures["state_error"] == pytest.approx(results[0][0]["state_error"], rel=1e-6)
        assert (gradients - results[0][1]).norm() < 1e-5 * results[0][1].norm()


@pytest.mark.parametrize("name", HAS_OPTIMUM_AT_THE_TEACHER)
def test_a_student_that_is_its_own_teacher_has_no_loss_and_no_gradient(make_config, scored, name):
    engine = make_engine(make_config())
    own = score_by(engine.student.causal_lm, OBJECTIVES[name], scored)
    heads = own_heads(engine.student.causal_lm, OBJECTIVES[name])
    (batches,) = plan_batches([own], 64)
    metrics = report(measure_gradient(engine, batches, task_of(name, completion_tokens(own), heads)))
    assert abs(metrics["loss"]) < 1e-5
    assert metrics["gradient_norm"] < 1e-5
    assert abs(metrics["kl"]) < 1e-5
    assert metrics["sampler_learner_gap"] < 1e-5
    assert metrics["importance_mean"] == pytest.approx(1, abs=1e-5)


def test_a_router_learns_from_the_objective_alone(make_config, scored, tmp_path):
    """At student = teacher the objective's gradient is 0, so any other loss would show."""
    losses = {"output_router_logits": True, "router_aux_loss_coef": 10.0, "router_jitter_noise": 0.1}
    MixtralForCausalLM(MixtralConfig(**SMALL, **losses, num_local_experts=4)).save_pretrained(tmp_path)
    engine = make_engine(make_config(f"student.model={tmp_path}"))
    own = score_by(engine.student.causal_lm, OBJECTIVES["topk"], scored)
    (batches,) = plan_batches([own], 64)
    metrics = report(measure_gradient(engine, batches, task_of("topk", completion_tokens(own))))
    assert metrics["gradient_norm"] < 1e-5


def test_candidate_masses_of_student_and_teacher_are_the_same_where_they_are_the_same_model(make_config, scored):
    engine = make_engine(make_config())
    own = score_by(engine.student.causal_lm, OBJECTIVES["topk"], scored)
    (batches,) = plan_batches([own], 64)
    metrics = report(measure_gradient(engine, batches, task_of("topk", completion_tokens(own))))
    expected = np.exp(ragged(own, "teacher_candidate_logprobs").values).sum(-1).mean()
    assert metrics["teacher_candidate_mass"] == pytest.approx(expected, abs=1e-5)
    assert metrics["student_candidate_mass"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["topk", "full"])
def test_training_on_the_same_batch_brings_the_student_closer_to_the_teacher(make_config, name):
    engine = make_engine(make_config())
    scored, heads, tokens = scored_for(name)
    (batches,) = plan_batches(scored, 128)
    task = task_of(name, tokens, heads)
    losses = [report(train_step(engine, batches, task, 3e-3))["loss"] for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]


def test_task_rewards_make_rewarded_completions_likelier_and_the_others_less_likely(make_config):
    scored, _, tokens = scored_for("reward")
    (batches,) = plan_batches(scored, 1000)
    terms = {"reward": OBJECTIVES["reward"].terms["reward"]}
    objective = Objective(msgspec.structs.replace(OBJECTIVES["reward"], terms=terms))
    engine = make_engine(make_config())

    def logprobs():
        with torch.no_grad():
            return engine.forward(batches[0]).logprobs.double()

    before, advantage = logprobs(), batches[0].tokens.task_advantage
    train_step(engine, batches, WholeStep(objective, tokens), 1e-3)
    change = logprobs() - before
    assert change[advantage > 0].mean() > 0
    assert change[advantage < 0].mean() < 0
    assert (advantage == 0).sum() == 12, "the last trajectory is the only sample of its prompt"


def test_measuring_leaves_the_weights_and_the_next_step_alone(make_config, scored):
    (batches,) = plan_batches([scored], 128)
    measured, plain = make_engine(make_config()), make_engine(make_config())
    task = task_of("topk", completion_tokens(scored))
    measure_gradient(measured, batches, task)
    train_step(measured, batches, task, 1e-3)
    train_step(plain, batches, task, 1e-3)
    torch.testing.assert_close(measured.student.state_dict(), plain.student.state_dict(), atol=0, rtol=0)


def test_figures_are_means_over_completion_tokens(make_config):
    engine = make_engine(make_config())
    (scored,), _, tokens = scored_for("sampled")
    (batches,) = plan_batches([scored], 64)
    metrics = report(measure_gradient(engine, batches, task_of("sampled", tokens)))
    scored_by_itself = score_by(engine.student.causal_lm, OBJECTIVES["sampled"], scored)
    own = ragged(scored_by_itself, "teacher_logprobs").values
    rollout, teacher = ragged(scored, "rollout_logprobs").values, ragged(scored, "teacher_logprobs").values
    assert metrics["kl"] == pytest.approx((own - teacher).mean(), abs=1e-5)
    assert metrics["sampler_learner_gap"] == pytest.approx(np.abs(own - rollout).mean(), abs=1e-5)
    assert metrics["importance_max"] == pytest.approx(np.exp(own - rollout).max(), rel=1e-4)
    assert metrics["loss"] == pytest.approx((np.exp(own - rollout) * (own - teacher)).mean(), abs=1e-5)
    assert "teacher_candidate_mass" not in metrics


def test_tokens_of_a_privileged_sampler_stand_apart_in_the_figures(make_config):
    engine = make_engine(make_config())
    (scored,), _, tokens = scored_for("sampled")
    samplers = ["privileged:student" if row % 2 else "student" for row in range(scored.num_rows)]
    position = scored.schema.get_field_index("sampler")
    mixed = scored.set_column(position, scored.schema.field(position), pa.array(samplers))
    (batches,) = plan_batches([mixed], 64)
    metrics = report(measure_gradient(engine, batches, task_of("sampled", tokens)))
    (others,) = plan_batches([scored], 64)
    of_all = report(measure_gradient(engine, others, task_of("sampled", tokens)))
    own = ragged(score_by(engine.student.causal_lm, OBJECTIVES["sampled"], scored), "teacher_logprobs")
    teacher = ragged(scored, "teacher_logprobs")
    kl = np.concatenate([own[row] - teacher[row] for row in range(0, scored.num_rows, 2)]).mean()
    assert metrics["kl"] == pytest.approx(kl, abs=1e-5)
    logprobs = np.concatenate([own[row] for row in range(1, scored.num_rows, 2)])
    assert metrics["privileged_logprob"] == pytest.approx(logprobs.mean(), abs=1e-5)
    assert metrics["loss"] == pytest.approx(of_all["loss"])  # the objective has one term, of all rows
    assert "privileged_logprob" not in of_all


def test_draws_have_no_teacher_mass_for_one_may_stand_there_twice(make_config):
    (scored,), _, tokens = scored_for("samples")
    (batches,) = plan_batches([scored], 64)
    metrics = report(measure_gradient(make_engine(make_config()), batches, task_of("samples", tokens)))
    assert "teacher_candidate_mass" not in metrics
    assert 0 < metrics["student_candidate_mass"] < 1


def test_figures_of_two_ranks_merge_into_those_of_one(make_config, scored):
    engine = make_engine(make_config())
    task = task_of("topk", completion_tokens(scored))
    ((whole,),) = plan_batches([scored], 1000)
    shares = plan_batches([scored], 64, ranks=2)
    parts = [measure_gradient(engine, share, task) for share in shares]
    of_one = report(measure_gradient(engine, [whole], task))
    merged = report(merge(parts))
    for name in (
        "loss",
        "kl",
        "entropy",
        "importance_mean",
        "importance_max",
        "importance_p99",
        "teacher_candidate_mass",
    ):
        assert merged[name] == pytest.approx(of_one[name], abs=1e-5), name


def test_the_next_micro_batch_is_made_while_one_is_computed_and_no_more_of_them():
    """Time per micro-batch is therefore the longer of making and computing it, not their sum."""
    began = [threading.Event() for _ in range(5)]

    def made():
        for number, event in enumerate(began):
            event.set()
            yield number

    for number in prefetched(made(), torch.device("cpu")):
        assert began[min(number + 1, 4)].wait(timeout=20)
        time.sleep(0.01)
        assert not any(event.is_set() for event in began[number + 2 :])


def test_a_fault_in_making_a_micro_batch_comes_where_it_is_taken():
    def made():
        yield "first"
        raise ValueError("the second has no tokens")

    batches = prefetched(made(), torch.device("cpu"))
    assert next(batches) == "first"
    with pytest.raises(ValueError, match="the second has no tokens"):
        next(batches)


@pytest.mark.parametrize("completes_step", [False, True])
def test_micro_batches_may_come_one_by_one_and_the_last_of_the_step_is_marked(make_config, scored, completes_step):
    (batches,) = plan_batches([scored], 50)
    engine = make_engine(make_config())
    marks = []
    backward = engine.backward
    engine.backward = lambda loss, is_last: (marks.append(is_last), backward(loss, is_last))
    accumulate(engine, iter(batches), len(batches), Objective(OBJECTIVES["topk"]), {}, completes_step)
    assert marks == [False, False, False, False, completes_step]


def test_a_step_without_completion_tokens_changes_no_weight(make_config):
    engine = make_engine(make_config("learner.weight_decay=0.0"))
    before = {name: value.clone() for name, value in engine.student.state_dict().items()}
    metrics = report(train_step(engine, [build_micro_batch((), [], seed=0)], task_of("topk", 0), 1e-3))
    assert metrics["gradient_norm"] == 0
    torch.testing.assert_close(engine.student.state_dict(), before, atol=0, rtol=0)


def test_a_gradient_above_the_limit_is_scaled_down_to_it(make_config, scored):
    config = make_config()
    (batches,) = plan_batches([scored], 1000)
    limited = msgspec.structs.replace(config.learner, max_gradient_norm=1e-3, epsilon=1.0)
    engine = ReferenceEngine(load_student(config.student, limited), limited)
    parameters = list(engine.student.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    train_step(engine, batches, task_of("topk", completion_tokens(scored)), 1.0)
    # With epsilon 1 far above the gradient, AdamW's first step is the clipped gradient itself.
    moved = torch.cat([(parameter - old).flatten() for parameter, old in zip(parameters, before, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=0.01)


def test_the_moments_of_the_optimizer_decay_as_the_run_file_says(make_config, scored):
    engine = make_engine(make_config("learner.betas=[0.5, 0.75]"))
    (batches,) = plan_batches([scored], 1000)
    train_step(engine, batches, task_of("topk", completion_tokens(scored)), 1e-3)
    first, second = (engine.snapshot()[f"0.{name}"] for name in ("exp_avg", "exp_avg_sq"))
    assert first.abs().max() > 0
    # After one step they are (1 - 0.5) g and (1 - 0.75) g squared, so the first one squared is the second.
    torch.testing.assert_close(first.square(), second)


def test_bfloat16_weights_learn_in_steps_that_bfloat16_cannot_show(make_config, scored):
    engine = make_engine(make_config("learner.dtype=bfloat16", "learner.weight_decay=0"))
    (batches,) = plan_batches([scored], micro_batch_tokens=64)
    task = task_of("topk", completion_tokens(scored))
    norms = engine.student.causal_lm.model.norm.weight
    for _ in range(60):  # each moves a weight of 1 by at most 1e-4, where bfloat16 has steps of 4e-3 below 1
        train_step(engine, batches, task, 1e-4)
    assert (norms.float() - 1).abs().max() > 3e-3


def test_a_restored_bfloat16_engine_goes_on_as_if_it_had_not_stopped(make_config, scored):
    config = make_config("learner.dtype=bfloat16")
    (batches,) = plan_batches([scored], micro_batch_tokens=64)
    task = task_of("topk", completion_tokens(scored))

    def steps(engine, count):
        for _ in range(count):
            train_step(engine, batches, task, 1e-3)
        return engine.snapshot()

    whole, first, second = (make_engine(config) for _ in range(3))
    second.restore(steps(first, 2))
    continued = steps(second, 2)
    for name, expected in steps(whole, 4).items():
        assert torch.equal(continued[name], expected), name


class Unfinished(torch.Tensor):
    """A tensor that a device still computes: whoever reads it waits."""

    SECONDS = 0.1

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.item:
            time.sleep(cls.SECONDS)
        return super().__torch_function__(function, types, args, kwargs or {})


class DeferringEngine(ReferenceEngine):
    """Returns as a GPU does, when the work has been handed out."""

    def forward(self, batch, objective=None, teacher_heads=None):
        found = super().forward(batch, objective, teacher_heads)
        return replace(found, entropy=found.entropy.as_subclass(Unfinished))


def test_a_learner_is_busy_until_its_figures_can_be_read(make_config, scored):
    config = make_config()
    engine = DeferringEngine(load_student(config.student, config.learner), config.learner)
    (batches,) = plan_batches([scored], 50)
    figures = report(accumulate_all(engine, batches, task_of("sampled", completion_tokens(scored))))
    assert figures["busy_seconds"] > len(batches) * Unfinished.SECONDS
