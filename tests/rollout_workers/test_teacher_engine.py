"""Texts from the workers of a teacher, with named stand-ins for the actors."""

import asyncio
from typing import Any

import numpy as np
import pytest
import ray

from cluster.actors import named_actors
from cluster.contracts.errors import ActorDiedError, RolloutError
from cluster.contracts.requests import Completion, SamplingSettings
from rollout_workers.privileged import TeacherEngine

SAMPLING = SamplingSettings(4, 1.0)


class StandIn:
    """Answers as a teacher's actor does: the prompt's last token, twice; or raises what it is given."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.asked = error, list[Any]()

    @property
    def generate(self) -> "StandIn":
        return self

    async def remote(self, prompt_ids: Any, *asked: Any) -> Completion:
        self.asked.append(asked)
        if self.error is not None:
            raise self.error
        return Completion(np.full(2, prompt_ids[-1], np.int32), np.zeros(2, np.float32), "stop", np.zeros(2, np.int32))


def generate(monkeypatch: pytest.MonkeyPatch, actors: dict[str, StandIn], retry_seconds: float = 1.0) -> Completion:
    def fitting(pattern: Any) -> dict[str, StandIn]:
        return {name: actor for name, actor in actors.items() if pattern.fullmatch(name)}

    monkeypatch.setattr(named_actors, "named_actors", fitting)
    engine = TeacherEngine("math", retry_seconds, lambda: 5)
    return asyncio.run(engine.generate("7-0", [3, 4], SAMPLING, seed=9, priority=2))


def test_a_text_has_the_version_of_the_student_that_selects_it(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = StandIn()
    completion = generate(monkeypatch, {"teacher-math-0": worker})
    assert (completion.token_ids.tolist(), completion.policy_versions.tolist()) == ([4, 4], [5, 5])
    assert worker.asked == [(SAMPLING, 9, 2)]


def test_workers_of_that_teacher_alone_are_asked_also_those_that_took_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {name: StandIn() for name in ("teacher-mathematics-0", "teacher-main-0", "rollout-0", "slot-math-0")}
    for right in ("teacher-math-3", "teacher-math-0-again-2", "teacher-math@0a1b2c-0", "teacher-math@0a1b2c-1-again-1"):
        worker = StandIn()
        generate(monkeypatch, {**wrong, right: worker})
        assert len(worker.asked) == 1
    assert not any(one.asked for one in wrong.values())


@pytest.mark.parametrize("error", [ray.exceptions.RayActorError(), ActorDiedError("it has not started")])
def test_another_worker_takes_over_from_one_that_is_gone(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    actors = {"teacher-math-0": StandIn(error), "teacher-math-1": StandIn()}
    assert generate(monkeypatch, actors).token_ids.tolist() == [4, 4]


def test_without_workers_the_error_says_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = r"request 7-0: no worker of teacher math wrote within teachers.math.retry_seconds = 0.3"
    with pytest.raises(RolloutError, match=expected):
        generate(monkeypatch, {}, retry_seconds=0.3)
