"""A batch is scored by one version of the weights, however updates and scores come."""

import asyncio
from typing import Any

from teacher_workers.served_weights import ServedWeights


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
