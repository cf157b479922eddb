"""Teachers that take turns, with engines that only write down what happens to them."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from cluster.contracts.errors import ModelError
from teacher_workers.time_sharing import TimeSharing


class Engine:
    """Sleeps and wakes at once, and notes it."""

    def __init__(self, name: str, events: list[str], wakes: bool = True) -> None:
        self._name, self._events, self._wakes = name, events, wakes
        self.is_awake = False

    async def sleep(self) -> None:
        self._events.append(f"{self._name} sleeps")
        self.is_awake = False

    async def wake(self) -> None:
        if not self._wakes:
            raise ModelError("vLLM cannot serve it")
        await asyncio.sleep(0.001)
        self._events.append(f"{self._name} wakes")
        self.is_awake = True


class Slot:
    """Two engines, of which `math` is awake."""

    def __init__(self, code_wakes: bool = True) -> None:
        self.events: list[str] = []
        self.engines = {"math": Engine("math", self.events), "code": Engine("code", self.events, code_wakes)}
        self.engines["math"].is_awake = True
        self.share = TimeSharing(self.engines, "math", switch_seconds=0.001)

    async def score(self, teacher: str, label: str = "") -> None:
        async with self.share.turn(teacher):
            assert [name for name, engine in self.engines.items() if engine.is_awake] == [teacher]
            self.events.append(f"{teacher} scores{label}")
            await asyncio.sleep(0.001)
            assert self.engines[teacher].is_awake


def run(slot: Slot, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def both() -> None:
        conducting = asyncio.create_task(slot.share.conduct())
        try:
            async with asyncio.timeout(20):
                await work()
        finally:
            conducting.cancel()

    asyncio.run(both())


def test_only_the_awake_engine_is_asked_and_one_switch_serves_all_that_wait() -> None:
    slot = Slot()

    async def work() -> None:
        await asyncio.gather(*(slot.score(teacher) for teacher in ("code", "math", "code", "math")))

    run(slot, work)
    assert slot.events == ["math scores", "math scores", "math sleeps", "code wakes", "code scores", "code scores"]
    num_switches, seconds = slot.share.take_woken("code")
    assert num_switches == 1
    assert seconds > 0
    assert slot.share.take_woken("code") == slot.share.take_woken("math") == (0, 0.0)


def test_hundreds_of_requests_in_any_order_are_all_served() -> None:
    slot = Slot()

    async def work() -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(300):
                tasks.create_task(slot.score("math" if number % 7 % 2 else "code"))
                await asyncio.sleep(0.0005 * (number % 3))

    run(slot, work)
    assert sum(event.endswith("scores") for event in slot.events) == 300


def test_a_request_that_was_given_up_holds_no_turn() -> None:
    slot = Slot()

    async def work() -> None:
        given_up = asyncio.create_task(slot.score("code", " for nobody"))
        await asyncio.sleep(0)
        given_up.cancel()
        await slot.score("code")
        await slot.score("math")

    run(slot, work)
    assert [event for event in slot.events if "scores" in event] == ["code scores", "math scores"]


def test_an_engine_that_does_not_wake_ends_what_gives_turns() -> None:
    slot = Slot(code_wakes=False)

    async def work() -> None:
        conducting = asyncio.create_task(slot.share.conduct())
        waiting = asyncio.create_task(slot.score("code"))
        with pytest.raises(ModelError, match="cannot serve it"):
            await conducting
        waiting.cancel()

    asyncio.run(work())
