"""A batch is scored by one version of the weights, however updates and scores come."""

import asyncio
from types import SimpleNamespace
from typing import Any

from cluster.actors.cluster import PoolTimeouts
from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ActorDiedError, WeightSyncError
from cluster.vllm.weight_sync.served_weights import ServedWeights
from teacher_workers.pool import TeacherPool


class Backend:
    """Writes down what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def start_weight_update(self) -> None:
        self.calls.append("start")

    async def finish_weight_update(self, policy_version: int) -> str:
        self.calls.append(f"finish {policy_version}")
        return "checksum"


async def use(weights: ServedWeights, backend: Backend, name: str, end: asyncio.Event) -> None:
    async with weights.in_use() as version:
        backend.calls.append(f"{name} begins with {version}")
        await end.wait()
        backend.calls.append(f"{name} ends")


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_an_update_waits_for_batches_under_way_and_later_batches_wait_for_it() -> None:
    async def run() -> list[str]:
        backend: Any = Backend()
        weights, end = ServedWeights(backend), asyncio.Event()
        tasks = [asyncio.create_task(use(weights, backend, "first", end))]
        await settle()
        tasks.append(asyncio.create_task(weights.start_weight_update()))
        await settle()
        tasks.append(asyncio.create_task(use(weights, backend, "second", end)))
        await settle()
        assert backend.calls == ["first begins with 0"]
        end.set()
        await settle()
        assert await weights.finish_weight_update(3) == "checksum"
        await asyncio.gather(*tasks)
        return list(backend.calls)

    assert asyncio.run(run()) == [
        "first begins with 0",
        "first ends",
        "start",
        "finish 3",
        "second begins with 3",
        "second ends",
    ]


def test_a_batch_that_fails_does_not_keep_an_update_waiting() -> None:
    async def fail(weights: ServedWeights) -> None:
        async with weights.in_use():
            raise ValueError("no scores")

    async def run() -> list[str]:
        backend: Any = Backend()
        weights = ServedWeights(backend)
        await asyncio.gather(fail(weights), return_exceptions=True)
        await asyncio.wait_for(weights.start_weight_update(), timeout=5)
        return list(backend.calls)

    assert asyncio.run(run()) == ["start"]


class Replicas:
    """Three actors: the first is as it should be, the second was left in an update, the third is dead."""

    def __init__(self) -> None:
        self.teachers = {"self": TeacherConfig("student", source="student", refresh="live")}
        self.serving, self.num_gone, self.cluster = [0, 1, 2], 0, self
        self.lost: dict[int, str] = {}

    def actor(self, replica: int) -> Any:
        return SimpleNamespace(abandon=SimpleNamespace(remote=lambda: replica))

    def name(self, replica: int) -> str:
        return f"teacher-self-{replica}"

    def get(self, reference: int, timeout_seconds: float, waiting_for: str) -> None:
        if reference == 1:
            raise WeightSyncError("an update of the weights was begun and never ended")
        if reference == 2:
            raise ActorDiedError("it died")

    def lose(self, replica: int, error: Exception) -> None:
        self.lost[replica] = type(error).__name__

    def forget_loads(self) -> None:
        """Keep no loads."""


def test_a_run_that_goes_back_starts_workers_again_that_an_update_left_half_way() -> None:
    replicas: Any = Replicas()
    TeacherPool("self", replicas, PoolTimeouts(1, 1)).abandon()
    assert replicas.lost == {1: "WeightSyncError", 2: "ActorDiedError"}


def test_workers_whose_weights_never_change_are_left_alone() -> None:
    replicas: Any = Replicas()
    replicas.teachers = {"self": TeacherConfig("student", source="student")}
    TeacherPool("self", replicas, PoolTimeouts(1, 1)).abandon()
    assert replicas.lost == {}
