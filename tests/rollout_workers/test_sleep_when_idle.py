"""When an engine sleeps: while it has no user, and never under one."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from rollout_workers.vllm_engine import SleepWhenIdle


class Sleeper:
    """An engine that takes its time to fall asleep and to wake, and notes what happens."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.is_asleep = False

    async def sleep(self) -> None:
        self.events.append("falls asleep")
        await asyncio.sleep(0)
        self.is_asleep = True

    async def wake(self) -> None:
        await asyncio.sleep(0)
        self.is_asleep = False
        self.events.append("wakes")

    async def use(self, idle: SleepWhenIdle, name: str, turns: int = 1) -> None:
        async with idle.awake():
            for _ in range(turns):
                assert not self.is_asleep
                await asyncio.sleep(0)
            self.events.append(name)


def run(scene: Callable[[Sleeper, SleepWhenIdle], Coroutine[Any, Any, None]]) -> list[str]:
    sleeper = Sleeper()
    asyncio.run(scene(sleeper, SleepWhenIdle(sleeper.sleep, sleeper.wake)))
    return sleeper.events


def test_an_engine_falls_asleep_when_the_last_one_is_done() -> None:
    async def scene(sleeper: Sleeper, use: SleepWhenIdle) -> None:
        await asyncio.gather(sleeper.use(use, "long", turns=9), sleeper.use(use, "short"))

    assert run(scene) == ["short", "long", "falls asleep"]


def test_it_is_awake_again_before_the_next_one_uses_it() -> None:
    async def scene(sleeper: Sleeper, use: SleepWhenIdle) -> None:
        await sleeper.use(use, "first")
        await asyncio.gather(*(sleeper.use(use, "next") for _ in range(2)))

    assert run(scene) == ["first", "falls asleep", "wakes", "next", "next", "falls asleep"]


def test_a_user_that_comes_while_it_falls_asleep_wakes_it() -> None:
    async def scene(sleeper: Sleeper, use: SleepWhenIdle) -> None:
        first = asyncio.create_task(sleeper.use(use, "first"))
        while "falls asleep" not in sleeper.events:
            await asyncio.sleep(0)
        assert not sleeper.is_asleep  # on its way
        await asyncio.gather(first, sleeper.use(use, "late"))

    assert run(scene) == ["first", "falls asleep", "wakes", "late", "falls asleep"]


def test_an_update_of_the_weights_keeps_it_awake_between_its_calls() -> None:
    async def scene(sleeper: Sleeper, use: SleepWhenIdle) -> None:
        await use.begin()
        await sleeper.use(use, "request")
        assert not sleeper.is_asleep
        await use.end()

    assert run(scene) == ["request", "falls asleep"]


def test_a_request_that_fails_lets_it_sleep_too() -> None:
    async def scene(sleeper: Sleeper, use: SleepWhenIdle) -> None:
        async def fail() -> None:
            async with use.awake():
                raise ValueError

        await asyncio.gather(fail(), return_exceptions=True)

    assert run(scene) == ["falls asleep"]
