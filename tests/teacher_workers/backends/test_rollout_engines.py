"""Scores from the rollout pool's actors, with named stand-ins for the actors."""

import asyncio
from typing import Any

import numpy as np
import pytest
import ray

from cluster.actors import named_actors
from cluster.config.run_file import parse_run_config
from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ConfigError, ScoreError
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import make_generated
from teacher_workers.backends.base import check_signals
from teacher_workers.backends.listed_logprobs import columns
from teacher_workers.backends.rollout_engines import RolloutEnginesBackend
from tests.builders import make_trajectory

LIVE = TeacherConfig("student", source="student", refresh="live", backend="rollout", retry_seconds=1.0)
TOP_TWO = ScoreRequest("teacher", top_k=2)


class StandIn:
    """Answers as a rollout actor does: id t at a place has probability 1/2, and 7 and 8 have 0.3 and 0.2."""

    def __init__(self, versions: list[int], is_dead: bool = False) -> None:
        self.versions, self.is_dead = versions, is_dead
        self.asked: list[int] = []

    @property
    def prompt_logprobs(self) -> "StandIn":
        return self

    async def remote(self, rows: Any, num_listed: int, newest: int) -> tuple[Any, Any, int]:
        if self.is_dead:
            raise ray.exceptions.RayActorError
        version = self.versions.pop(0) if len(self.versions) > 1 else self.versions[0]
        self.asked.append(newest)
        if version < newest:
            return np.empty((0, 1), np.int32), np.empty((0, 1), np.float32), version
        own = np.concatenate([ids[places] for ids, places in rows])
        ids = np.stack([own, own, *(np.full(len(own), 7 + number) for number in range(num_listed - 1))], 1)
        probabilities = np.array([0.5, 0.5, 0.3, 0.2, 1e-3][: 1 + num_listed])
        return ids.astype(np.int32), np.log(np.broadcast_to(probabilities, ids.shape)).astype(np.float32), version


def score(
    monkeypatch: pytest.MonkeyPatch, actors: dict[str, StandIn], teacher: TeacherConfig = LIVE, version: int = 0
) -> Any:
    monkeypatch.setattr(named_actors, "named_actors", lambda pattern: actors)
    row = make_trajectory((1, 2), (3, 4), min_policy_version=version, max_policy_version=version)
    return asyncio.run(RolloutEnginesBackend(teacher, 16).score(make_generated([row]), TOP_TWO))


def test_scores_are_of_the_written_tokens_and_of_the_most_likely_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, metrics, version = score(monkeypatch, {"rollout-0": StandIn([4])}, version=4)
    assert (version, metrics) == (4, {})
    np.testing.assert_allclose(np.exp(scores["logprobs"]), [0.5, 0.5], rtol=1e-6)
    assert scores["candidate_ids"].tolist() == [[3, 7], [4, 7]]
    np.testing.assert_allclose(np.exp(scores["candidate_logprobs"]), [[0.5, 0.3]] * 2, rtol=1e-6)


def test_an_engine_whose_weights_are_older_than_a_row_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    late = StandIn([1, 2, 3])
    *_, version = score(monkeypatch, {"rollout-0": late}, version=3)
    assert version == 3
    assert late.asked == [3, 3, 3]


def test_another_engine_takes_over_from_a_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = {"rollout-0": StandIn([0], is_dead=True), "rollout-1-again-1": StandIn([0])}
    *_, version = score(monkeypatch, actors)
    assert version == 0


def test_without_engines_the_error_says_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ScoreError, match=r"no rollout engine scored with weights of version 2 or later"):
        score(monkeypatch, {"rollout-0": StandIn([1])}, version=2)


def test_a_stop_class_is_one_token_though_its_members_are_listed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    merging = TeacherConfig(
        "student", source="student", refresh="live", backend="rollout", retry_seconds=1.0, stop_class=(8, 7)
    )
    scores, *_ = score(monkeypatch, {"rollout-0": StandIn([0])}, merging)
    assert scores["candidate_ids"].tolist() == [[3, 8], [4, 8]]  # 7 and 8 together are as likely as the written token
    np.testing.assert_allclose(np.exp(scores["candidate_logprobs"]), [[0.5, 0.5]] * 2, rtol=1e-6)


def test_a_written_member_that_is_not_listed_counts_too() -> None:
    listed = np.array([[9, 1, 8]], np.int32), np.log(np.array([[0.1, 0.6, 0.2]], np.float32))
    own, ids, logprobs = columns(listed, (8, 9), 2)
    assert np.exp(own) == pytest.approx(0.3)
    assert ids.tolist() == [[1, 8]]
    assert np.exp(logprobs[0]) == pytest.approx([0.6, 0.3])


RUN = """
[student]
model = "student"
[prompts]
train = "prompts.jsonl"
[teachers.main]
from = "student"
backend = "rollout"
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "set from = 'student' and refresh = 'live'"),
        (["teachers.main.refresh=live", "teachers.main.slot=one"], "has no slot"),
        (["teachers.main.refresh=live", "rollout.engine.sleep=true"], "set rollout.engine.sleep = false"),
    ],
)
def test_a_teacher_that_cannot_score_there_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run_config(RUN, overrides)


def test_an_objective_that_needs_more_than_listed_tokens_is_refused() -> None:
    config = parse_run_config(RUN, ["teachers.main.refresh=live", "objective=exact-reverse-kl"])
    with pytest.raises(ConfigError, match=r"does not send hidden.*'sampled' and 'topk' work"):
        check_signals(config)
