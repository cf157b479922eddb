"""Forms a group of the learner's rank 0 and the rollout engines' ranks, or gives it up within a limit.

NCCL waits without a limit for a rank that is gone. So all ranks first meet at a TCP store, where waiting has one, and
join only when everyone is there. They join in a thread of its own, while every rank watches the store: a rank that
gives up says so there, and all others give up too. None of them ends, and each may form the next group.

The store stays as long as the group. While a rank waits in a broadcast, another of its threads watches the store, and
frees it when the group is given up.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Event, Thread
from typing import Any, Protocol

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed has them, untyped
from torch.distributed import DistError

from cluster.contracts.errors import WeightSyncError

FORMING_SECONDS = 60.0  # NCCL takes a few, over many nodes perhaps ten
POLL_SECONDS = 0.02
WATCH_SECONDS = 0.25  # between looks at the store of a group that is in use: as many as it has ranks
ARRIVED, BEGINS, GIVEN_UP = "arrived", "begins", "given up"  # keys of the store


class Backend(Protocol):
    """Makes a group of ranks that have met."""

    def join(self, store: Store, rank: int, world_size: int) -> Any:
        """Wait for the other ranks, perhaps for ever, and return the group."""

    def abort(self) -> None:
        """Free the GPU of a `join` that will not come back; it may still be running."""


@dataclass
class Meeting:
    """Says where the ranks of one group meet; the first rank holds the store as long as it keeps this object."""

    master_address: str
    master_port: int
    world_size: int
    rank: int
    seconds: float = FORMING_SECONDS  # to meet and join
    _store: TCPStore | None = field(default=None, repr=False)

    def form(self, backend: Backend, is_given_up: Callable[[], bool] = lambda: False) -> Any:
        """Return the backend's group, in which all ranks are.

        Raises:
            WeightSyncError: a rank did not come, failed or gave up, or `is_given_up` became true here.
        """
        deadline = time.monotonic() + self.seconds
        try:
            self._store = store = self._connect(is_master=self.rank == 0)
            self._meet(store, deadline, is_given_up)
            return self._join(store, backend, deadline, is_given_up)
        except DistError as error:  # the store's rank is gone, or cannot be reached
            raise WeightSyncError(self._sentence(f"{_first_line(error)}")) from error

    def give_up(self, reason: str) -> None:
        """Tell the other ranks, as far as they can be reached, that the group is given up, formed or not."""
        if self._store is not None:
            with suppress(DistError):
                self._store.set(GIVEN_UP, reason)

    @contextmanager
    def watched(self, abort: Callable[[], None]) -> Iterator["Future[str]"]:
        """Watch for as long as the context lasts, and call `abort` in another thread when the group is given up.

        What is given is done then: the reason. The end of the first rank, which holds the store, is one too.
        """
        given_up: Future[str] = Future()
        is_over = Event()
        thread = Thread(target=self._abort_when_given_up, args=(abort, given_up, is_over), daemon=True)
        thread.start()
        try:
            yield given_up
        finally:
            is_over.set()
            thread.join()

    def _abort_when_given_up(self, abort: Callable[[], None], given_up: "Future[str]", is_over: Event) -> None:
        store = self._store
        assert store is not None, "the group has formed"
        while not is_over.wait(WATCH_SECONDS):
            try:
                if not store.check([GIVEN_UP]):
                    continue
                reason = store.get(GIVEN_UP).decode()
            except DistError as error:
                reason = f"its first rank is gone: {_first_line(error)}"
            given_up.set_result(reason)
            abort()
            return

    def _connect(self, is_master: bool) -> TCPStore:
        timeout = timedelta(seconds=2 * self.seconds)  # our deadline comes first, but where nobody answers
        return TCPStore(
            self.master_address, self.master_port, is_master=is_master, wait_for_workers=False, timeout=timeout
        )

    def _meet(self, store: TCPStore, deadline: float, is_given_up: Callable[[], bool]) -> None:
        """Wait until all ranks are at the store."""
        store.add(ARRIVED, 1)
        while not store.check([BEGINS]):
            arrived = store.add(ARRIVED, 0)
            if self.rank == 0 and arrived == self.world_size:
                store.set(BEGINS, "")
                return
            missing = f"{self.world_size - arrived} of them did not come within {self.seconds:g} s"
            self._watch(store, deadline, is_given_up, missing)

    def _join(self, store: TCPStore, backend: Backend, deadline: float, is_given_up: Callable[[], bool]) -> Any:
        joined: Future[Any] = Future()
        # On a connection of its own: what waits on one keeps others from reading it.
        arguments = (joined, backend, PrefixStore("join", self._connect(False)), self.rank, self.world_size)
        Thread(target=_join, args=arguments, name="weight-transfer-group", daemon=True).start()
        try:
            while not wait([joined], POLL_SECONDS).done:
                self._watch(store, deadline, is_given_up, f"they did not join within {self.seconds:g} s")
            return joined.result()
        except (WeightSyncError, DistError):
            backend.abort()
            raise
        except (RuntimeError, OSError, ValueError) as error:  # of NCCL: another rank is gone, or cannot be reached
            backend.abort()
            raise self._given_up(str(error)) from error

    def _watch(self, store: TCPStore, deadline: float, is_given_up: Callable[[], bool], late: str) -> None:
        """Raise WeightSyncError when the group is not to form, here or at another rank."""
        if store.check([GIVEN_UP]):
            raise WeightSyncError(self._sentence(store.get(GIVEN_UP).decode()))
        if is_given_up():
            raise self._given_up("a rollout worker died or failed meanwhile")
        if time.monotonic() > deadline:
            hint = "if none of them died, set NCCL_SOCKET_IFNAME to the interface that connects the nodes"
            raise self._given_up(f"{late}; {hint}")
        time.sleep(POLL_SECONDS)

    def _given_up(self, reason: str) -> WeightSyncError:
        """Tell the other ranks and return the error."""
        self.give_up(reason)
        return WeightSyncError(self._sentence(reason))

    def _sentence(self, reason: str) -> str:
        return f"the group of {self.world_size} ranks that weights pass through did not form: {reason}"


def _join(joined: "Future[Any]", backend: Backend, store: Store, rank: int, world_size: int) -> None:
    try:
        joined.set_result(backend.join(store, rank, world_size))
    except (RuntimeError, OSError, ValueError) as error:  # of NCCL and of the store
        joined.set_exception(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
