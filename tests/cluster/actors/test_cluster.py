"""How errors of Ray actors reach the caller."""

from collections.abc import Iterator

import pytest
import ray

from cluster.actors.cluster import RAY
from cluster.contracts.errors import ActorError, ScoreError

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
