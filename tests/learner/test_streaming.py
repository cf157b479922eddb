"""Learning while trajectories arrive gives the gradients of the whole step at once, whatever the order and the cut."""

import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.contracts.batches import BatchHandle
from cluster.contracts.trajectory import ragged
from cluster.contracts.wire import to_wire
from learner.batching.arrivals import BatchBuffer
from learner.batching.micro_batch import build_micro_batch, trajectories
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
        "only",
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
}


@pytest.fixture(scope="module", params=STREAMED)
def step(request, make_config):
    """Return two ranks with the same student, the rows of a step, and their gradient at once."""
    config = make_config(f"rollout.samples_per_prompt={SAMPLES_PER_PROMPT}")
    engines = [ReferenceEngine(load_student(config.student, config.learner), config.learner) for _ in range(2)]
    objective = STREAMED[request.param]
    scored = make_scored(objective)
    rows = trajectories([scored], advantages_of([scored]))
    ((grid,),) = plan_step([len(row.token_ids) for row in rows], 1, 1000)
    whole = WholeStep(Objective(objective), completion_tokens(scored))
    accumulate_all(engines[0], [build_micro_batch(grid, rows, config.run.seed)], whole)
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
        planner.add({index: arrivals.num_tokens(index) for index in arrivals.add(handle_of(scored.slice(row, 1)))})
        rounds += planner.all_rounds() if data.draw(st.booleans()) else planner.full_rounds()
    planner.add({index: arrivals.num_tokens(index) for index in arrivals.rest()})
    rounds += planner.all_rounds() or [((),) * num_ranks]
    for position, grids in enumerate(rounds, start=1):
        for worker, grid in zip(workers, grids, strict=False):
            worker.accumulate(arrivals.share((grid,)), completes_step=position == len(rounds), objective=objective)
    found = gradients_of(engines[:num_ranks], arrivals.num_loss_tokens)
    assert torch.linalg.vector_norm(found - at_once) <= 1e-6 * torch.linalg.vector_norm(at_once)
