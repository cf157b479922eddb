"""Ranks meet and join, or give up within a limit."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
from torch.distributed import Store

from cluster.contracts.errors import WeightSyncError
from cluster.weight_sync.joint_group import WATCH_SECONDS, Meeting

HOST = "127.0.0.1"


class Joined:
    """Joins by writing to the store, which all ranks then read."""

    def __init__(self, act: Callable[[], None] = lambda: None) -> None:
        self._act = act
        self._is_aborted = Event()
        self.num_aborts = 0

    def join(self, store: Store, rank: int, world_size: int) -> list[int]:
        self._act()
        store.set(str(rank), str(10 * rank))
        ranks = [str(other) for other in range(world_size)]
        while not store.check(ranks):
            if self._is_aborted.wait(0.01):
                raise RuntimeError("aborted")
        return [int(store.get(other)) for other in ranks]

    def abort(self) -> None:
        self.num_aborts += 1
        self._is_aborted.set()


def meetings(world_size: int, seconds: float = 20.0) -> list[Meeting]:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port = int(listener.getsockname()[1])
    return [Meeting(HOST, port, world_size, rank, seconds) for rank in range(world_size)]


def never() -> bool:
    return False


def form_all(ranks: list[Meeting], backends: list[Joined], is_given_up: Callable[[], bool] = never) -> list[Any]:
    """Return what each rank gets, or the error that it raises; `is_given_up` is rank 0's."""
    with ThreadPoolExecutor(len(ranks)) as threads:
        stops = [is_given_up, *(never for _ in ranks[1:])]
        futures = [threads.submit(*task) for task in zip([rank.form for rank in ranks], backends, stops, strict=False)]
        return [future.exception() or future.result() for future in futures]


def test_all_ranks_join_when_all_have_met() -> None:
    assert form_all(meetings(3), [Joined() for _ in range(3)]) == [[0, 10, 20]] * 3


def test_a_rank_that_never_comes_is_waited_for_within_the_limit() -> None:
    began = time.monotonic()
    errors = form_all(meetings(3, seconds=2.0)[:2], [Joined(), Joined()])
    assert time.monotonic() - began < 20
    for error in errors:
        assert isinstance(error, WeightSyncError)
        assert "group of 3 ranks that weights pass through did not form" in str(error)
    assert "1 of them did not come within 2 s" in str(errors[0])
    assert "NCCL_SOCKET_IFNAME" in str(errors[0])


def test_a_rank_that_hangs_while_it_joins_is_left_behind_and_aborted() -> None:
    is_over = Event()
    backends = [Joined(), Joined(is_over.wait)]  # type: ignore[arg-type]
    errors = form_all(meetings(2, seconds=2.0), backends)
    is_over.set()
    assert all("did not join within 2 s" in str(error) for error in errors)
    assert [backend.num_aborts for backend in backends] == [1, 1]


def test_the_reason_of_the_rank_that_fails_reaches_all_others() -> None:
    def fail() -> None:
        raise RuntimeError("NCCL error: unhandled system error")

    errors = form_all(meetings(3, seconds=5.0), [Joined(), Joined(fail), Joined()])
    assert all("did not form: NCCL error: unhandled system error" in str(error) for error in errors)


def test_what_rank_0_gives_up_all_give_up_and_may_meet_again() -> None:
    began, is_given_up = time.monotonic(), Event()
    is_given_up.set()
    ranks = meetings(3)[:2]
    errors = form_all(ranks, [Joined(), Joined()], is_given_up.is_set)
    assert all("a rollout worker died or failed meanwhile" in str(error) for error in errors)
    assert time.monotonic() - began < 20  # the limit of a meeting
    assert form_all(meetings(2), [Joined(), Joined()]) == [[0, 10]] * 2


@pytest.mark.parametrize("is_first_gone", [False, True])
def test_a_rank_is_freed_from_a_group_that_another_gives_up_or_whose_first_is_gone(is_first_gone: bool) -> None:
    first, second = meetings(2)
    assert form_all([first, second], [Joined(), Joined()]) == [[0, 10]] * 2
    freed = Event()
    with second.watched(freed.set) as given_up:
        if is_first_gone:
            del first  # and with it the store
        else:
            first.give_up("a rollout worker died")
        assert freed.wait(20)
    assert given_up.result().startswith("its first rank is gone" if is_first_gone else "a rollout worker died")


def test_a_rank_of_a_group_that_holds_is_left_alone() -> None:
    ranks = meetings(2)
    form_all(ranks, [Joined(), Joined()])
    freed = Event()
    with ranks[1].watched(freed.set) as given_up:
        assert not freed.wait(2 * WATCH_SECONDS)
    ranks[0].give_up("too late")
    assert not freed.wait(2 * WATCH_SECONDS)
    assert not given_up.done()
