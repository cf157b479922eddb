"""Newcomers join a group of GPUs, and the others survive a death at any moment; no GPU is needed."""

import time
from collections.abc import Callable, Iterator, Mapping
from threading import Event
from typing import Any

import pytest
from torch import Tensor

from cluster.contracts.errors import ActorError, WeightSyncError
from cluster.weight_sync.joint_group import Meeting
from learner.weight_sync import gpu_update
from learner.weight_sync.gpu_links import NcclLink, describe
from tests.learner.weight_sync.fake_gpus import (
    FakeGroup,
    FakeRecipients,
    Publication,
    assert_all_arrived,
    in_place,
    nccl,
    received,
)


class BlockedGroup(FakeGroup):
    """Does not come back when it is left, as NCCL does not after a death."""

    def destroy(self) -> None:
        raise AssertionError("this would wait")


def test_a_newcomer_comes_by_the_object_store_and_the_group_goes_on() -> None:
    groups: list[FakeGroup] = []

    def join(meeting: Meeting, is_given_up: Callable[[], bool]) -> FakeGroup:
        groups.append(BlockedGroup() if not groups else FakeGroup())
        return groups[-1]

    link = NcclLink(True, lambda: ("10.0.0.1", 5000), 1, 48, join)
    publication = Publication(lambda buffer: link)
    publication.publish("a", "b")
    publication.publish("c")  # as `bring_weights` does, in the middle of a step
    publication.publish("d")  # another one, before anything else is published
    assert len(groups) == 1
    assert [(new.workers, new.policy_version, new.is_finished) for new in publication.newcomers] == [
        (["c"], 1, True),
        (["d"], 1, True),
    ]
    for new in publication.newcomers:
        messages = [describe(bucket) for bucket, _ in new.sent]
        assert_all_arrived(received(messages, [values for _, values in new.sent]))
    assert [recipients.calls for recipients in publication.all_recipients[1:]] == [
        [("start_weight_update", {}), ("finish_weight_update", {})]
    ] * 2  # nobody else pauses
    publication.publish("a", "b", version=2)  # they died meanwhile
    assert len(groups) == 1
    assert publication.ends == []


def test_newcomers_join_the_group_with_the_publication_after_their_first() -> None:
    groups: list[FakeGroup] = []
    publication = Publication(nccl(groups))
    publication.publish("a", "b")
    publication.publish("c")
    publication.publish("d")
    publication.publish("a", "b", "c", "d", version=2)
    assert [group.is_destroyed for group in groups] == [True, False]  # once for both
    [invitation] = publication.all_recipients[-1].messages("init_weight_transfer")
    assert {message["world_size"] for message in invitation.values()} == {5}
    assert len(publication.newcomers) == 2


def test_one_that_is_new_in_a_publication_takes_part_in_no_handshake() -> None:
    groups: list[FakeGroup] = []
    publication = Publication(nccl(groups), crashing={"c": ("init_weight_transfer", 1)})
    publication.publish("a", "b")
    publication.publish("a", "b", "c", version=2)
    assert len(groups) == 1
    assert [new.workers for new in publication.newcomers] == [["c"]]
    assert publication.ends == []


def test_one_that_comes_to_a_shared_gpu_reads_the_buffer_as_the_others_do() -> None:
    publication = Publication(lambda buffer: in_place({"GPU-0": buffer}))
    publication.publish("a")
    publication.publish("b")
    assert publication.newcomers == []
    assert publication.all_recipients[1].messages("finish_weight_update") == [{0: 1}]


def test_a_worker_that_dies_before_the_broadcast_is_left_out_of_the_group() -> None:
    publication = Publication(nccl([]), crashing={"b": ("start_weight_update", 1)})
    publication.publish("a", "b", "c")
    [invitation] = publication.all_recipients[0].messages("init_weight_transfer")
    assert {position: message["rank_offset"] for position, message in invitation.items()} == {0: 1, 2: 2}
    assert {message["world_size"] for message in invitation.values()} == {3}
    assert publication.ends == []


@pytest.mark.parametrize("bucket", [1, 2, 3])
def test_after_a_death_in_a_broadcast_the_others_get_everything_again_without_the_dead(bucket: int) -> None:
    groups: list[FakeGroup] = []
    publication = Publication(nccl(groups), crashing={"b": ("update_weights", bucket)})
    report = publication.publish("a", "b", "c")
    assert [group.is_destroyed for group in groups] == [True, False]
    broken, anew = publication.all_recipients
    assert len(broken.messages("update_weights")) == bucket
    assert list(anew.workers.values()) == ["a", "c"]
    [invitation] = anew.messages("init_weight_transfer")
    assert {message["world_size"] for message in invitation.values()} == {3}
    updates = anew.messages("update_weights")
    assert_all_arrived(received([update[1] for update in updates], groups[1].broadcasts))
    assert not broken.messages("finish_weight_update")
    assert anew.messages("finish_weight_update") == [{0: 1, 1: 1}]
    assert publication.ends == []
    assert report.num_bytes == 72
    publication.publish("a", "c", version=2)
    assert len(groups) == 2


def test_a_newcomer_gets_its_weights_once_though_the_group_breaks_and_joins_the_next() -> None:
    groups: list[FakeGroup] = []
    crashing = {"b": ("update_weights", 9)}
    publication = Publication(nccl(groups), crashing=crashing)
    publication.publish("a", "b")
    publication.all_recipients.clear()
    crashing["b"] = ("update_weights", 2)
    publication.publish("a", "b", "new", version=2)
    [newcomers] = publication.newcomers
    assert_all_arrived(received([describe(bucket) for bucket, _ in newcomers.sent], [v for _, v in newcomers.sent]))
    publication.publish("a", "new", version=3)
    assert len(publication.newcomers) == 1
    assert [sorted(r.workers.values()) for r in publication.all_recipients] == [["a"], ["a"], ["a", "new"]]


def test_all_ranks_of_the_learner_gather_everything_again_when_rank_0_does() -> None:
    others = iter([True, False])
    publication = Publication(nccl([], is_sender=False), agree=lambda value: [next(others), value])
    publication.engine.rank = 1
    publication.publish("a")
    assert publication.engine.gathered == 2 * [["embed.weight"], ["norm.weight", "proj.weight"], ["scale"]]


class BlockedGpu(FakeGroup):
    """Waits in its first broadcast for ranks that never come, as NCCL does, until the group is left or a test over."""

    def __init__(self, is_over: Event, is_freed_by_abort: bool = True) -> None:
        super().__init__()
        self._is_over, self._is_freed_by_abort = is_over, is_freed_by_abort

    def broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        self._is_over.wait()

    def destroy(self) -> None:
        super().destroy()
        if self._is_freed_by_abort:
            self._is_over.set()


@pytest.fixture
def is_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """Let threads that wait for ever go when a test ends."""
    monkeypatch.setattr(gpu_update, "CHECK_SECONDS", 0.05)
    event = Event()
    yield event
    event.set()


def stuck_link(is_over: Event, in_opening: bool, is_freed_by_abort: bool = False) -> Callable[[Tensor], NcclLink]:
    def join(meeting: Meeting, is_given_up: Callable[[], bool]) -> FakeGroup:
        while in_opening and not is_over.wait(0.01):
            if is_given_up():
                raise WeightSyncError("the group did not form")
        return BlockedGpu(is_over, is_freed_by_abort) if meeting.world_size == 3 else FakeGroup()

    return lambda buffer: NcclLink(True, lambda: ("10.0.0.1", 5000), 1, buffer.numel(), join)


@pytest.mark.parametrize(
    ("verb", "in_opening"), [("init_weight_transfer", True), ("update_weights", False)], ids=["opening", "broadcast"]
)
def test_a_worker_that_fails_while_nccl_waits_for_it_is_heard(is_over: Event, verb: str, in_opening: bool) -> None:
    class Failing(FakeRecipients):
        def poll(self, references: Mapping[int, Any]) -> None:
            if self.calls[-1][0] == verb:
                raise WeightSyncError("no memory is left on the GPU")

    publication = Publication(stuck_link(is_over, in_opening), recipients=Failing)
    with pytest.raises(WeightSyncError, match="no memory is left"):
        publication.publish("a", "b")


def test_a_death_while_nccl_waits_in_a_broadcast_frees_the_learners_gpu(is_over: Event) -> None:
    link = stuck_link(is_over, in_opening=False, is_freed_by_abort=True)
    publication = Publication(link, crashing={"b": ("update_weights", 1)})
    publication.publish("a", "b")
    assert publication.all_recipients[-1].messages("finish_weight_update") == [{0: 1}]
    assert publication.ends == []


def test_where_nccl_does_not_let_go_of_the_gpu_the_learners_rank_ends(
    is_over: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(gpu_update, "FREE_SECONDS", 0.1)
    crashing = {"b": ("update_weights", 1)}
    publication = Publication(stuck_link(is_over, in_opening=False), crashing=crashing, end=end)
    with pytest.raises(SystemExit):
        publication.publish("a", "b")


def test_a_worker_that_lives_and_is_not_freed_ends_the_learners_rank() -> None:
    class Held(FakeRecipients):
        """Has a worker whose GPU waits for the dead one, whatever its process does."""

        def answers(self, references: Mapping[int, Any], what_for: str, **hooks: Any) -> dict[int, Any]:
            if any(references.values()) and what_for.startswith("receive"):
                assert hooks["on_death"]() == gpu_update.FREE_SECONDS
                raise ActorError("waited 60 s for rollout worker 0")
            return super().answers(references, what_for, **hooks)

    def end(code: int) -> None:
        raise SystemExit(code)

    publication = Publication(nccl([]), crashing={"b": ("update_weights", 2)}, recipients=Held, end=end)
    with pytest.raises(SystemExit):
        publication.publish("a", "b")


def test_a_broadcast_that_never_ends_though_nobody_died_ends_the_run_with_a_sentence(is_over: Event) -> None:
    publication = Publication(stuck_link(is_over, in_opening=False))
    with pytest.raises(WeightSyncError, match=r"did not reach all rollout workers within 0.5 s.*NCCL_SOCKET_IFNAME"):
        publication.publish("a", "b")


class FailingGroup(FakeGroup):
    """Fails in its second broadcast, as NCCL does where it hears of a death before Ray does."""

    def broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        super().broadcast(tensor, src, stream)
        if len(self.broadcasts) == 2:
            raise RuntimeError("NCCL error: remote process exited")


def failing_link(buffer: Tensor) -> NcclLink:
    def join(meeting: Meeting, is_given_up: Callable[[], bool]) -> FakeGroup:
        return FailingGroup() if meeting.world_size == 3 else FakeGroup()

    return NcclLink(True, lambda: ("10.0.0.1", 5000), 1, 48, join)


def test_what_nccl_fails_with_at_a_death_is_the_death() -> None:
    publication = Publication(failing_link, crashing={"b": ("update_weights", 2)})
    publication.publish("a", "b")
    assert publication.all_recipients[-1].messages("finish_weight_update") == [{0: 1}]


def test_what_nccl_fails_with_while_all_live_reaches_the_user() -> None:
    with pytest.raises(WeightSyncError, match=r"NCCL failed while weights were sent: .*remote process exited"):
        Publication(failing_link).publish("a", "b")


def test_after_a_death_while_the_group_forms_the_others_form_another() -> None:
    groups: list[FakeGroup] = []

    def join(meeting: Meeting, is_given_up: Callable[[], bool]) -> FakeGroup:
        while meeting.world_size == 3:  # as long as the dead one is waited for
            if is_given_up():
                raise WeightSyncError("the group did not form")
            time.sleep(0.01)
        groups.append(FakeGroup())
        return groups[-1]

    link = NcclLink(True, lambda: ("10.0.0.1", 5000), 1, 48, join)
    publication = Publication(lambda buffer: link, crashing={"b": ("init_weight_transfer", 1)})
    publication.publish("a", "b")
    [recipients] = publication.all_recipients
    assert [sorted(message) for message in recipients.messages("init_weight_transfer")] == [[0, 1], [0]]
    assert [sorted(message) for message in recipients.messages("finish_weight_update")] == [[0]]
    assert publication.ends == []
    publication.publish("a", version=2)
    assert len(groups) == 1


def test_a_death_beside_a_shared_buffer_ends_nothing() -> None:
    publication = Publication(lambda buffer: in_place({"GPU-0": buffer}), crashing={"b": ("update_weights", 2)})
    publication.publish("a", "b")
    assert publication.ends == []
    finished = publication.all_recipients[0].messages("finish_weight_update")
    assert finished == [{0: 1}]


def test_without_workers_nothing_is_connected_or_sent() -> None:
    groups: list[FakeGroup] = []
    publication = Publication(nccl(groups))
    publication.publish()
    assert groups == []
