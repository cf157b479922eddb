"""How errors of Ray actors reach the caller."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster.actors.cluster import RAY, RayCluster
from cluster.contracts.errors import ActorDiedError, ActorError, ScoreError

pytestmark = pytest.mark.slow


@pytest.fixture
def pair(ray_cluster: None) -> Iterator[list[ray.actor.ActorHandle]]:
    actors = RAY.create(
        "tests.failing_actor:FailingActor", ["failing-0", "failing-1"], [(0,), (1,)], [{"num_cpus": 0}] * 2
    )
    yield actors
    RAY.shutdown(actors, timeout_seconds=1)


def test_answers_come_in_the_order_of_the_actors(pair: list[ray.actor.ActorHandle]) -> None:
    assert RAY.call_all(pair, "answer", timeout_seconds=60, waiting_for="answers") == [0, 1]


def test_an_error_of_ours_arrives_as_itself_with_its_sentence_alone(pair: list[ray.actor.ActorHandle]) -> None:
    with pytest.raises(ScoreError, match=r"^row 3 is NaN$"):
        RAY.get(pair[0].refuse.remote(), 60, "scores")


def test_a_timeout_says_who_is_late(pair: list[ray.actor.ActorHandle]) -> None:
    RAY.call_all(pair, "answer", timeout_seconds=60, waiting_for="both to run")
    with pytest.raises(ActorError, match=r"^waited 1 s for a nap; no answer from failing-1$"):
        RAY.call_all(pair, "sleep_if_last", timeout_seconds=1, waiting_for="a nap", names=["failing-0", "failing-1"])


def test_a_dead_actor_is_an_error_that_says_what_was_awaited(pair: list[ray.actor.ActorHandle]) -> None:
    with pytest.raises(ActorError, match="while waiting for a last word"):
        RAY.get(pair[0].die.remote(), 60, "a last word")


def test_who_was_killed_printed_no_error(pair: list[ray.actor.ActorHandle]) -> None:
    with pytest.raises(
        ActorDiedError, match=r"The actor died .*; it printed no error, as when it is killed$"
    ) as raised:
        RAY.get(pair[0].die.remote(), 60, "a last word")
    assert raised.value.last_error == ""


@pytest.mark.parametrize("method", ["die", "lose_engine"])
def test_the_last_error_that_a_dead_actor_or_its_engine_printed_is_in_the_sentence(
    method: str, pair: list[ray.actor.ActorHandle], tmp_path: Path
) -> None:
    cluster = RayCluster(logs=tmp_path)
    last_words = "Traceback (most recent call last):\nValueError: the width is 16\nbye\n"
    with pytest.raises(
        ActorDiedError, match=rf"error: ValueError: the width is 16; its output is in {tmp_path}"
    ) as raised:
        cluster.get([pair[1].answer.remote(), getattr(pair[0], method).remote(last_words)], 60, "a last word")
    assert raised.value.last_error == "ValueError: the width is 16"
    assert last_words in (tmp_path / "failing-0.log").read_text()


def test_the_trace_of_an_error_that_is_not_ours_is_kept(pair: list[ray.actor.ActorHandle], tmp_path: Path) -> None:
    with pytest.raises(KeyError) as raised:
        RayCluster(logs=tmp_path).get(pair[0].fail.remote(), 60, "a last word")
    assert raised.value.__notes__ == [f"its output is in {tmp_path / 'failing-0.log'}"]
    assert "KeyError: 'w4'" in (tmp_path / "failing-0.log").read_text()


def test_a_dead_actor_is_explained_without_an_answer_of_its_own(pair: list[ray.actor.ActorHandle]) -> None:
    pair[0].die.remote("ValueError: the width is 16\n")
    RAY.wait([pair[0].__ray_ready__.remote()], 1, 60)
    explained = RAY.explain(ActorDiedError("failing-0 fell silent"), pair[0])
    assert str(explained) == "failing-0 fell silent; its last error: ValueError: the width is 16"
