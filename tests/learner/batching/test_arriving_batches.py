"""When a group sends what has arrived to its ranks; the ranks are stubs that only wait."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import ray

from cluster.actors.cluster import RayCluster
from cluster.config.stages import TeacherConfig
from cluster.contracts.batches import BatchHandle, ReadyBatches
from cluster.contracts.errors import ScoreError
from cluster.contracts.metrics import report
from learner.group import LEARNER_ACTOR, LearnerGroup

SHORTEST_UNIT_SECONDS = 0.1


class Scripted:
    """Gives out batches at given moments after the first `take`, and notes when it was woken without one."""

    def __init__(self, arrivals: Sequence[tuple[float, BatchHandle]]) -> None:
        self._arrivals = list(arrivals)
        self._started: float | None = None
        self.num_woken = 0

    @property
    def is_exhausted(self) -> bool:
        return not self._arrivals

    @property
    def missing(self) -> int:
        return sum(len(handle.num_tokens) for _, handle in self._arrivals)

    def take(self, wake_on: Sequence[Any] = ()) -> list[BatchHandle]:
        self._started = self._started or time.perf_counter()
        seconds, handle = self._arrivals[0]
        left = max(0.0, self._started + seconds - time.perf_counter())
        if wake_on and ray.wait(list(wake_on), num_returns=1, timeout=left)[0]:
            self.num_woken += 1
            return []
        time.sleep(max(0.0, self._started + seconds - time.perf_counter()))
        del self._arrivals[0]
        return [handle]

    def move_on_until(self, references: Sequence[Any]) -> None:
        """Do nothing: no other step is under way."""


def handle_of(num_tokens: int) -> BatchHandle:
    return BatchHandle(num_tokens, "only", (0,), (num_tokens,), (num_tokens,))


@pytest.fixture
def start(make_config, ray_cluster) -> Iterator[Callable[..., LearnerGroup]]:
    """Start a group of one rank, with overrides."""
    started = []

    def begin(*overrides: str) -> LearnerGroup:
        group = LearnerGroup(
            make_config("learner.num_workers=1", "learner.micro_batch_tokens=1000000", *overrides),
            [{"num_cpus": 0}],
            RayCluster({LEARNER_ACTOR: "tests.learner.stub_rank:StubRank"}),
        )
        started.append(group)
        return group

    yield begin
    for group in started:
        group.shutdown()


@pytest.fixture
def group(start) -> LearnerGroup:
    return start()


@pytest.fixture
def unit(group) -> float:
    """Return seconds that are long beside what the group itself takes for a step on this machine now."""
    took = []
    for _ in range(5):
        began = time.perf_counter()
        group.step(ReadyBatches([handle_of(1)]), 0)
        took.append(time.perf_counter() - began)
    return max(SHORTEST_UNIT_SECONDS, 3 * max(took))


def slow_tokens(unit: float) -> int:
    """Return how many tokens the stub rank computes in three units; it takes a millisecond for each."""
    return round(3 * 1000 * unit)


def test_batches_that_came_while_the_rank_was_busy_are_sent_when_it_is_idle_though_nothing_else_comes(
    group, unit: float
) -> None:
    slow = slow_tokens(unit)
    source = Scripted([(0.0, handle_of(slow)), (unit, handle_of(20)), (9 * unit, handle_of(10))])
    figures = report(group.step(source, 0))
    assert source.num_woken >= 1
    # The second batch was computed long before the last one came.
    assert figures["largest_round_tokens"] == slow
    assert figures["rounds"] == 3


def test_what_arrives_while_the_rank_is_busy_is_computed_together(group, unit: float) -> None:
    handles = [handle_of(slow_tokens(unit)), handle_of(20), handle_of(30), handle_of(40)]
    source = Scripted([(0.2 * unit * index, handle) for index, handle in enumerate(handles)])
    assert report(group.step(source, 0))["rounds"] == 2


def test_an_idle_rank_waits_for_a_quarter_of_the_step(group, unit: float) -> None:
    figures = report(group.step(Scripted([(unit * index, handle_of(10)) for index in range(5)]), 0))
    assert (figures["rounds"], figures["tokens"]) == (3, 50)  # two of five, two of five, and the last


def test_only_the_last_round_completes_the_step(group, unit: float) -> None:
    source = Scripted([(0.0, handle_of(20)), (5 * unit, handle_of(10))])
    figures = report(group.step(source, 4))
    assert (figures["rounds"], figures["completing_rounds"], figures["tokens"]) == (2, 1, 30)
    assert figures["step"] == 4  # whose learning rate the ranks take


def test_a_worker_that_comes_late_gets_the_version_that_the_others_have(group) -> None:
    worker: Any = None
    for version in (5, 6):
        assert group.publish_weights([], version).policy_version == version
        assert ray.get(group.bring_weights(worker)).policy_version == version


def test_rounds_that_are_ready_together_go_eight_in_a_call_and_only_the_last_call_completes_the_step(start) -> None:
    group = start("learner.micro_batch_tokens=10")
    figures = report(group.step(ReadyBatches([handle_of(10) for _ in range(20)]), 0))
    assert (figures["rounds"], figures["micro_batches"], figures["completing_rounds"]) == (3, 20, 1)
    assert figures["tokens"] == 200


def test_a_rank_that_fails_is_noticed_before_the_last_batch_comes(group) -> None:
    started = time.perf_counter()
    with pytest.raises(ScoreError, match="stub"):
        group.step(Scripted([(0.0, handle_of(0)), (60.0, handle_of(10))]), 0)
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize(("preset", "expected"), [("exact-reverse-kl", [0, 0, 2, 3]), ("tail-topk", [0, 0, 0, 0])])
def test_the_head_of_a_replaced_teacher_is_read_before_its_first_step_where_the_objective_needs_it(
    start, preset: str, expected: list[int]
) -> None:
    group = start(f"objective={preset}")
    heads = []
    for step in range(4):
        if step == 1:  # both are asked for while step 1 is still to be learned from
            group.replace_teachers({"only": TeacherConfig("2")}, first_step=2)
            group.replace_teachers({"only": TeacherConfig("3")}, first_step=3)
        heads.append(report(group.step(ReadyBatches([handle_of(5)]), step))["teacher_head"])
    assert heads == expected


def test_a_scheduled_weight_is_that_of_the_step_whatever_steps_came_before(start) -> None:
    weight = "objective.terms.main.weight={from = 1.0, to = 0.5, over_steps = 10}"
    group = start("objective.preset=tail-topk", weight)
    for step, expected in [(0, 1.0), (4, 0.8), (10, 0.5), (11, 0.5), (4, 0.8)]:
        figures = report(group.step(ReadyBatches([handle_of(1)]), step))
        assert figures["weight/main"] == pytest.approx(expected)
        assert figures["step_of_weights"] == step


def test_ranks_learn_what_they_need_of_the_whole_step_before_its_first_gradient(start) -> None:
    group = start("objective.preset=thinking-machines", "objective.terms.main.baseline=batch_mean")
    figures = report(group.step(Scripted([(0.0, handle_of(10)), (0.5, handle_of(30))]), 0))
    assert (figures["rounds"], figures["tokens"]) == (1, 40)  # the first batch waited for the other
    assert figures["main_mean"] == (10 * 10 + 30 * 30) / 40
