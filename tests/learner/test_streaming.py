"""Learning while trajectories arrive gives the gradients of the whole step at once, whatever the order and the cut."""

import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.config.objective import ObjectiveConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.metrics import merge, report
from cluster.contracts.trajectory import ragged
from cluster.contracts.wire import to_wire
from learner.batching.arrivals import BatchBuffer
from learner.batching.micro_batch import MicroBatch, build_micro_batch, trajectories
from learner.batching.plan import RoundPlanner, plan_step
from learner.engines.torch import ReferenceEngine
from learner.loss.objective import Objective
from learner.model.student import load_student
from learner.worker import LearnerActor
from tests.learner.support import (
    OBJECTIVES,
    WholeStep,
    accumulate_all,
    advantages_of,
    completion_tokens,
    make_scored,
    objective_of,
)

SAMPLES_PER_PROMPT = 2
MICRO_BATCH_TOKENS = 48


def handle_of(batch: pa.RecordBatch) -> BatchHandle:
    return BatchHandle(
        batch,
        batch["teacher"][0].as_py(),
        tuple(batch["trajectory_id"].to_pylist()),
        tuple(ragged(batch, "token_ids").lengths.tolist()),
        tuple(ragged(batch, "rollout_logprobs").lengths.tolist()),
        rewards=tuple(batch["reward"].to_pylist()),
    )


def gradients_of(engines: list[ReferenceEngine], num_tokens: int) -> torch.Tensor:
    """Return the gradient of all ranks together per token, and clear it."""
    total = torch.zeros(())
    for engine in engines:
        total = total + torch.cat([parameter.grad.flatten() for parameter in engine.student.parameters()])
        engine.student.zero_grad()
    return total / num_tokens


# The rollout worker's log-probabilities are random here, and their ratios would multiply the rounding of float32.
WITHOUT_RATIO = {"loss": "task_reward", "importance": {"kind": "none"}}
STREAMED = {
    "topk": objective_of("tail-topk", support_size=8, terms={"main": {"residual": False}}),
    **{name: OBJECTIVES[name] for name in ("samples", "first_pass")},
    "reward": objective_of(
        "thinking-machines", terms={"main": {"importance": {"kind": "none"}}, "reward": WITHOUT_RATIO}
    ),
    "mean": objective_of(
        "thinking-machines", terms={"main": {"importance": {"kind": "none"}, "baseline": "batch_mean"}}
    ),
    "shares": objective_of("sdpo", support_size=8, token_weights={"teacher_shares": {"only": 1.0, "other": 3.0}}),
}


def of_two_teachers(scored: pa.RecordBatch) -> pa.RecordBatch:
    """Route every other row to another teacher, without changing its scores."""
    index = scored.schema.get_field_index("teacher")
    names = [("only", "other")[row % 2] for row in range(scored.num_rows)]
    return scored.set_column(index, scored.schema.field(index), pa.array(names, scored.schema.field(index).type))


def weights_of(objective: ObjectiveConfig, scored: pa.RecordBatch) -> list[float]:
    """Return what makes the mean losses of both teachers count their shares."""
    shares, lengths = objective.token_weights.teacher_shares, ragged(scored, "rollout_logprobs").lengths.tolist()
    if not isinstance(shares, dict):
        return []
    first, second = sum(lengths[::2]), sum(lengths[1::2])
    return [
        0.25 * sum(lengths) / first if row % 2 == 0 else 0.75 * sum(lengths) / second for row in range(len(lengths))
    ]


@torch.no_grad()
def means_of(objective: ObjectiveConfig, engine: ReferenceEngine, batch: MicroBatch) -> dict[str, float]:
    """Return the mean log-ratio of all tokens, if the objective takes it off."""
    if not objective.needs.step_means:
        return {}
    return {"main": float((batch.tokens.logprobs["teacher"] - engine.forward(batch).logprobs).double().mean())}


@pytest.fixture(scope="module", params=STREAMED)
def step(request, make_config):
    """Return two ranks with the same student, the rows of a step, and their gradient at once."""
    config = make_config(f"rollout.samples_per_prompt={SAMPLES_PER_PROMPT}")
    engines = [ReferenceEngine(load_student(config.student, config.learner), config.learner) for _ in range(2)]
    objective = STREAMED[request.param]
    scored = of_two_teachers(make_scored(objective))
    rows = trajectories([scored], advantages_of([scored]), weights_of(objective, scored))
    ((grid,),) = plan_step([len(row.token_ids) for row in rows], 1, 1000)
    batch = build_micro_batch(grid, rows, config.run.seed)
    means = means_of(objective, engines[0], batch)
    whole = WholeStep(Objective(objective, step_means=means), completion_tokens(scored))
    accumulate_all(engines[0], [batch], whole)
    at_once = gradients_of(engines[:1], completion_tokens(scored))
    workers = [LearnerActor(config, fetch=lambda batches: list(map(to_wire, batches))) for _ in engines]
    for worker, engine in zip(workers, engines, strict=True):
        worker.use(engine, {})
    return workers, engines, objective, scored, at_once


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), num_ranks=st.integers(1, 2))
def test_every_order_of_arrival_gives_the_gradient_of_the_batch_at_once(step, data, num_ranks) -> None:
    workers, engines, objective, scored, at_once = step
    order = data.draw(st.permutations(range(scored.num_rows)))
    arrivals = BatchBuffer(objective, SAMPLES_PER_PROMPT)
    planner = RoundPlanner(num_ranks, MICRO_BATCH_TOKENS)
    rounds = []
    for row in order:
        planner.add(arrivals.num_tokens(arrivals.add(handle_of(scored.slice(row, 1)))))
        rounds += planner.all_rounds() if data.draw(st.booleans()) else planner.full_rounds()
    planner.add(arrivals.num_tokens(arrivals.rest()))
    rounds += planner.all_rounds() or [((),) * num_ranks]
    if objective.needs.step_means:
        sums = merge(
            worker.advantage_sums(arrivals.share((grid,)), objective)
            for grids in rounds
            for worker, grid in zip(workers, grids, strict=False)
        )
        arrivals.step_means = report({"main": sums["main"]})
    for position, grids in enumerate(rounds, start=1):
        for worker, grid in zip(workers, grids, strict=False):
            worker.accumulate(arrivals.share((grid,)), completes_step=position == len(rounds), objective=objective)
    found = gradients_of(engines[:num_ranks], arrivals.num_loss_tokens)
    assert torch.linalg.vector_norm(found - at_once) <= 1e-6 * torch.linalg.vector_norm(at_once)
