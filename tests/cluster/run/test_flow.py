"""What the flow does when bytes are lost with a node; on pools that answer at once."""

from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import Any

from cluster.contracts.batches import BatchHandle
from cluster.contracts.requests import RolloutRequest, SamplingSettings, ScoreRequest
from cluster.run.flow import Flow

ROWS_PER_BATCH = 2


class Rollouts:
    """Writes every request at once, in batches of two rows."""

    def __init__(self) -> None:
        self.cluster = SimpleNamespace(wait_for_any=lambda pending, *_: pending())
        self.requested: list[tuple[int, list[int]]] = []  # rollout, trajectories
        self._written: list[BatchHandle] = []

    def submit(self, rollout: int, requests: Sequence[RolloutRequest], sampling: SamplingSettings) -> None:
        ids = [request.trajectory_id for request in requests]
        self.requested.append((rollout, ids))
        for first in range(0, len(ids), ROWS_PER_BATCH):
            rows = tuple(ids[first : first + ROWS_PER_BATCH])
            self._written.append(BatchHandle(None, "main", rows, (2,) * len(rows), (1,) * len(rows), rollout=rollout))

    def collect(self, ready: Collection[Any]) -> list[BatchHandle]:
        written, self._written = self._written, []
        return written

    def maintain(self) -> list[Any]:
        return ["something"]

    def late(self) -> str:
        return ""


class Teachers:
    """Scores every batch at once, but for the second, which is gone with its node."""

    def __init__(self) -> None:
        self._scored: list[BatchHandle] = []
        self._lost: list[BatchHandle] = []
        self._num_batches = 0

    def submit(self, handle: BatchHandle, route: Any) -> None:
        self._num_batches += 1
        (self._lost if self._num_batches == 2 else self._scored).append(handle)

    def collect(self, ready: Collection[Any]) -> list[BatchHandle]:
        scored, self._scored = self._scored, []
        return scored

    def take_lost(self) -> list[BatchHandle]:
        lost, self._lost = self._lost, []
        return lost

    maintain: Callable[..., list[Any]] = lambda _self: []
    late: Callable[..., str] = lambda _self: ""


def test_completions_that_were_lost_with_a_node_are_sampled_again_and_no_others() -> None:
    rollouts: Any = Rollouts()
    teachers: Any = Teachers()
    flow = Flow(rollouts, teachers, timeout_seconds=1.0)
    requests = [RolloutRequest(number, number, 0, seed=number) for number in range(6)]
    batches = flow.admit(7, requests, SamplingSettings(8, 1.0), lambda route: [(route, ScoreRequest("teacher"))])
    given: list[int] = []
    while not batches.is_exhausted:
        given += [key for handle in batches.take() for key in handle.trajectory_ids]
    assert sorted(given) == [0, 1, 2, 3, 4, 5]
    assert rollouts.requested == [(7, [0, 1, 2, 3, 4, 5]), (7, [2, 3])]


class Lossless(Teachers):
    """Scores every batch at once."""

    def submit(self, handle: BatchHandle, route: Any) -> None:
        self._scored.append(handle)


class Slow(Rollouts):
    """Hands one batch out for each event."""

    def collect(self, ready: Collection[Any]) -> list[BatchHandle]:
        return [self._written.pop(0)] if self._written else []


def test_the_next_step_is_scored_while_the_learner_computes_this_one() -> None:
    rollouts, teachers = Slow(), Lossless()
    flow = Flow(rollouts, teachers, timeout_seconds=1.0)  # type: ignore[arg-type]
    requests = [RolloutRequest(number, number, 0, seed=number) for number in range(8)]
    sampling = SamplingSettings(8, 1.0)
    this = flow.admit(0, requests[:2], sampling, lambda route: [])
    following = flow.admit(1, requests[2:], sampling, lambda route: [("main", ScoreRequest("teacher"))])
    assert this.take()
    assert not following.finished
    events = iter([[], ["rank 1"], ["rank 0"]])
    rollouts.cluster.wait_for_any = lambda pending, *_: pending() and next(events)
    this.move_on_until(["rank 0", "rank 1"])  # returns with the first answer, which may be an error
    assert [handle.trajectory_ids for handle in following.finished] == [(2, 3), (4, 5)]
    this.move_on_until(["rank 0"])
    assert len(following.finished) == 3
    this.move_on_until(["never"])  # returns, for nothing else is under way
    assert following.is_exhausted is False  # it is given out when it is learned from
