"""The rollout worker on an engine that writes what it is told."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.contracts.errors import RolloutError, WeightSyncError
from cluster.contracts.requests import Completion, RolloutRequest, SamplingSettings
from cluster.contracts.trajectory import ragged
from rollout_workers.worker import RolloutWorker
from tests.rollout_workers.deployment import make_prompts

SAMPLING = SamplingSettings(max_completion_tokens=8, temperature=1.0)


class ScriptedEngine:
    """Writes `seed` tokens of value 50, after as many turns of the event loop; fails for seed 0."""

    def __init__(self) -> None:
        self.request_ids: list[str] = []
        self.priorities: list[int] = []
        self.events: list[str] = []

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        self.request_ids.append(request_id)
        self.priorities.append(priority)
        if seed == 0:
            raise RolloutError("request given up")
        for _ in range(seed):
            await asyncio.sleep(0)
        versions = np.arange(4, 4 + seed, dtype=np.int32)
        return Completion(np.full(seed, 50, np.int32), np.full(seed, -1.0, np.float32), "stop", versions)

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        self.events.append("init")

    async def start_weight_update(self) -> None:
        self.events.append("start")

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        self.events.append("update")

    async def finish_weight_update(self, policy_version: int) -> str:
        return f"checksum-{policy_version}"

    async def shutdown(self) -> None:
        self.events.append("shutdown")


def make_worker(rows_per_batch: int = 2) -> tuple[RolloutWorker, ScriptedEngine]:
    engine = ScriptedEngine()
    worker = RolloutWorker(engine, lambda ids: " ".join(f"w{token}" for token in ids), rows_per_batch)
    worker.set_prompts(make_prompts())
    return worker, engine


async def collect(worker: RolloutWorker, requests: Sequence[RolloutRequest]) -> list[pa.RecordBatch]:
    return [written.rows async for written in worker.generate(requests, SAMPLING, "exact")]


def test_batches_are_filled_in_the_order_of_completion_and_never_mix_teachers() -> None:
    worker, _ = make_worker()
    # Even prompts go to one teacher, odd ones to the other; a larger seed takes longer.
    requests = [
        RolloutRequest(index, prompt, 0, seed) for index, (prompt, seed) in enumerate([(0, 9), (2, 3), (1, 1), (4, 6)])
    ]
    batches = asyncio.run(collect(worker, requests))
    assert [batch["trajectory_id"].to_pylist() for batch in batches] == [[1, 3], [2], [0]]
    assert [set(batch["teacher"].to_pylist()) for batch in batches] == [{"even"}, {"odd"}, {"even"}]


def test_only_a_prompt_with_an_answer_is_rewarded() -> None:
    worker, _ = make_worker(rows_per_batch=1)
    requests = [RolloutRequest(0, 0, 0, seed=1), RolloutRequest(1, 2, 0, seed=2), RolloutRequest(2, 1, 0, seed=3)]
    batches = asyncio.run(collect(worker, requests))
    assert [batch["reward"][0].as_py() for batch in batches] == [1.0, 0.0, None]  # "w50" is right, "w50 w50" is not


def test_a_row_holds_its_prompt_and_completion() -> None:
    worker, _ = make_worker()
    [batch] = asyncio.run(collect(worker, [RolloutRequest(0, 0, 0, seed=2)]))
    assert ragged(batch, "token_ids")[0].tolist() == [*range(10, 20), 50, 50]


def test_the_same_trajectory_asked_twice_has_two_request_ids() -> None:
    worker, engine = make_worker()
    asyncio.run(collect(worker, [RolloutRequest(0, 0, 0, seed=1)] * 2))
    assert len(set(engine.request_ids)) == 2


def test_a_failed_request_ends_the_call() -> None:
    worker, _ = make_worker()
    with pytest.raises(RolloutError, match="given up"):
        asyncio.run(collect(worker, [RolloutRequest(0, 0, 0, seed=5), RolloutRequest(1, 0, 1, seed=0)]))


def test_a_row_carries_the_versions_that_the_engine_names() -> None:
    worker, _ = make_worker()
    [batch] = asyncio.run(collect(worker, [RolloutRequest(0, 0, 0, seed=3)]))
    assert (batch["min_policy_version"][0].as_py(), batch["max_policy_version"][0].as_py()) == (4, 6)
    assert batch["version_changes"][0].as_py() == [1, 2]


def test_the_engine_is_told_the_priority_of_every_request() -> None:
    worker, engine = make_worker()

    async def scenario() -> None:
        requests = [RolloutRequest(0, 0, 0, seed=1), RolloutRequest(1, 0, 1, seed=1)]
        [_ async for _ in worker.generate(requests, SAMPLING, "exact", priority=7)]

    asyncio.run(scenario())
    assert engine.priorities == [7, 7]


def test_the_first_update_may_set_any_version_and_later_ones_only_go_forward() -> None:
    worker, _ = make_worker()
    assert asyncio.run(worker.finish_weight_update(7)) == "checksum-7"
    assert asyncio.run(worker.finish_weight_update(9)) == "checksum-9"
    with pytest.raises(WeightSyncError, match="version 9 arrived after version 9"):
        asyncio.run(worker.finish_weight_update(9))


def test_prompts_must_be_set_first() -> None:
    worker = RolloutWorker(ScriptedEngine(), str, 1)
    with pytest.raises(RolloutError, match="before the prompts were set"):
        asyncio.run(collect(worker, [RolloutRequest(0, 0, 0, seed=1)]))
