"""When an engine sleeps: while it has no user, and never under one."""

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cluster.contracts.errors import ActorDiedError
from cluster.vllm.sleep_calls import SleepCalls, put_to_sleep, wake
from rollout_workers.vllm_engine import SleepWhenIdle


class Sleeper:
    """An engine that takes its time to fall asleep and to wake, and notes what happens."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.is_asleep = False

    async def sleep(self, keeps_weights: bool) -> None:
        self.events.append("falls asleep" if keeps_weights else "rests")
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


def run(
    scene: Callable[[Sleeper, SleepWhenIdle], Coroutine[Any, Any, None]], after_last_user: bool = True
) -> list[str]:
    sleeper = Sleeper()
    asyncio.run(scene(sleeper, SleepWhenIdle(sleeper.sleep, sleeper.wake, after_last_user)))
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


def test_one_that_rests_sleeps_when_it_is_asked_to_and_wakes_for_weights() -> None:
    async def scene(sleeper: Sleeper, use: SleepWhenIdle) -> None:
        await sleeper.use(use, "first turn")
        await sleeper.use(use, "second turn")
        await use.rest()
        await use.rest()
        await use.begin(brings_weights=True)
        await use.end()
        await sleeper.use(use, "next step")

    events = run(scene, after_last_user=False)
    assert events == ["first turn", "second turn", "rests", "wakes", "next step"]


def test_one_in_use_does_not_rest() -> None:
    async def scene(sleeper: Sleeper, use: SleepWhenIdle) -> None:
        request = asyncio.create_task(sleeper.use(use, "request", turns=3))
        await asyncio.sleep(0)
        await use.rest()
        await request

    assert run(scene, after_last_user=False) == ["request"]


def test_without_weights_nothing_is_written() -> None:
    async def scene(sleeper: Sleeper, use: SleepWhenIdle) -> None:
        await use.rest()
        with pytest.raises(ActorDiedError, match="waits for new weights"):
            await sleeper.use(use, "request")
        await use.begin(brings_weights=True)

    assert run(scene, after_last_user=False) == ["rests", "wakes"]


class FakeBackend:
    """Stands for the memory that vLLM's weights are in: what is suspended without being kept is lost."""

    def __init__(self, model: nn.Module) -> None:
        self.levels: list[int] = []
        self._model, self._kept = model, dict[str, torch.Tensor]()

    def suspend(self, level: int) -> None:
        self.levels.append(level)
        self._kept = {name: value.clone() for name, value in self._model.state_dict().items()} if level == 1 else {}
        for value in self._model.state_dict().values():
            value.fill_(-1)

    def resume(self) -> None:
        self._model.load_state_dict(self._kept, strict=False)


class FakeWorker(SleepCalls):
    """vLLM's worker, on whose GPU others take memory while it sleeps: its own `sleep` would end it."""

    def __init__(self) -> None:
        model = nn.BatchNorm1d(3)  # has parameters and buffers
        model.register_parameter("e_score_correction_bias", nn.Parameter(torch.ones(3)))
        self.model_runner = SimpleNamespace(model=model)
        self.sleep_mode_backend = FakeBackend(model)

    def sleep(self, level: int) -> None:
        raise AssertionError("Memory usage increased after sleeping.")

    def wake_up(self) -> None:
        self.sleep_mode_backend.resume()


class FakeEngine:
    """An AsyncLLM with one worker; notes the calls."""

    def __init__(self) -> None:
        self.worker, self.calls = FakeWorker(), list[tuple[Any, ...]]()
        self.engine_core = self

    async def pause_scheduler_async(self, mode: str, clear_cache: bool) -> None:
        self.calls.append(("pause", mode, clear_cache))

    async def resume_generation(self) -> None:
        self.calls.append(("resume",))

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> None:
        self.calls.append((method, *args))
        getattr(self.worker, method)(*args)


@pytest.mark.parametrize(("keeps_weights", "level"), [(True, 1), (False, 2)])
def test_the_memory_goes_and_comes_back_with_all_that_no_update_brings(keeps_weights: bool, level: int) -> None:
    engine: Any = FakeEngine()
    model = engine.worker.model_runner.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asyncio.run(put_to_sleep(engine, keeps_weights))
    assert all((value == -1).all() for value in model.state_dict().values())
    asyncio.run(wake(engine))
    assert engine.calls == [
        ("pause", "abort", True),  # nothing is read from a cache that is gone
        ("give_memory", keeps_weights),
        ("take_memory",),
        ("resume",),
    ]
    assert engine.worker.sleep_mode_backend.levels == [level]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or (not keeps_weights and name in ("weight", "bias"))
