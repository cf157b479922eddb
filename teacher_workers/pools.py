"""All teachers of a run: each batch goes from pool to pool along its chain, and each adds its columns."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.actors import wait_for_any
from cluster.contracts.errors import LostBytesError, ScoreError
from cluster.contracts.interfaces import BatchHandle, ScoreRequest
from teacher_workers.pool import TeacherPool, Ticket

Chain = Sequence[tuple[str, ScoreRequest]]  # who scores a batch, in order, and what is asked of each: pool, request


@dataclass(frozen=True)
class _Leg:
    pool: TeacherPool  # scores now
    handle: BatchHandle
    request: ScoreRequest
    rest: Chain  # scores after it


class TeacherPools:
    """Sends batches along their chains.

    `score` is the whole of it for who has nothing else to wait for. A driver that waits for new batches at the same
    time uses the parts: `submit`, then a wait for what `look_after` returns and whatever else, then `collect`.
    """

    def __init__(self, pools: Mapping[str, TeacherPool], call_seconds: float) -> None:
        """Take the pools by teacher name; `call_seconds` bounds the wait for the next answer."""
        self._pools = pools
        self._call_seconds = call_seconds
        self._legs: dict[Ticket, _Leg] = {}
        self._waiting: list[_Leg] = []  # no replica of their pools serves
        self._lost: list[BatchHandle] = []

    @property
    def pools(self) -> Mapping[str, TeacherPool]:
        """Return the pools by teacher name."""
        return self._pools

    def score(self, handles: Iterable[BatchHandle], plan: Callable[[str], Chain]) -> Iterator[BatchHandle]:
        """Submit each batch as it comes and yield those whose chain is done, in any order.

        Args:
            handles: generated batches.
            plan: gives the chain of a batch's route, `handle.teacher`.

        Raises:
            ScoreError: a chain names an unknown teacher, or scores cannot be training data.
            LostBytesError: a batch is gone with the node that held it.
            ActorError: replicas died more often than they may, or nothing was scored in time; says what is late.
        """
        for handle in handles:
            self.submit(handle, plan(handle.teacher))
        while self._legs or self._waiting:
            yield from self.collect(wait_for_any(self.look_after, self._call_seconds, self._waited_for))
            if self._lost:
                raise LostBytesError(f"trajectories {self._lost[0].trajectory_ids} are gone with their node")

    def submit(self, handle: BatchHandle, chain: Chain) -> None:
        """Send a batch to the first pool of its chain, of at least one; returns at once.

        Raises:
            ScoreError: the chain names an unknown teacher.
        """
        for name, _ in chain:
            if name not in self._pools:
                raise ScoreError(f"a batch names the teacher {name!r}; there are {sorted(self._pools)}")
        (name, request), *rest = chain
        self._send(_Leg(self._pools[name], handle, request, rest))

    def look_after(self) -> list[Any]:
        """Deal with replicas that died unnoticed, and return references to wait for; `collect` takes those ready.

        Raises:
            ActorError: replicas died more often than they may.
        """
        arriving = [reference for pool in self._pools.values() for reference in pool.look_after()]
        self._send_again()
        return [*self._legs, *arriving]

    def collect(self, ready: Collection[Any]) -> list[BatchHandle]:
        """Return the batches whose chain is done, and send the others on.

        Args:
            ready: references that are ready; those that are not of these pools are passed over.

        Raises:
            ScoreError: scores cannot be training data; names teacher and replica.
            ActorError: replicas died more often than they may.
        """
        finished = []
        for ticket in ready:
            leg = self._legs.get(ticket)
            handle = self._take(ticket, leg) if leg else None
            if leg is not None and handle is not None:
                finished += self._move_on(leg, handle)
        for pool in self._pools.values():
            pool.welcome(ready)
        self._send_again()
        return finished

    def take_lost(self) -> list[BatchHandle]:
        """Return, once, the batches whose bytes are gone; they must be written again."""
        lost, self._lost = self._lost, []
        return lost

    def abandon(self) -> None:
        """Forget all batches that are being scored."""
        self._legs.clear()
        self._waiting.clear()
        self._lost.clear()
        for pool in self._pools.values():
            pool.abandon()

    def late(self) -> str:
        """Name the replicas that owe an answer."""
        return ", ".join(names for pool in self._pools.values() if (names := pool.late()))

    def shutdown(self) -> None:
        """End every pool."""
        for pool in self._pools.values():
            pool.shutdown()

    def _waited_for(self) -> str:
        return f"scores from {self.late()}"

    def _take(self, ticket: Ticket, leg: _Leg) -> BatchHandle | None:
        """Return a batch that its pool is done with, or nothing when its replica or the batch itself is gone."""
        try:
            handle = leg.pool.collect(ticket)
        except LostBytesError:
            self._lost.append(leg.handle)
            del self._legs[ticket]
            return None
        if handle is None:
            self._send_again()
        else:
            del self._legs[ticket]
        return handle

    def _move_on(self, leg: _Leg, handle: BatchHandle) -> list[BatchHandle]:
        """Send a batch to the next pool, or return it if there is none."""
        if not leg.rest:
            return [handle]
        self.submit(handle, leg.rest)
        return []

    def _send(self, leg: _Leg) -> None:
        if leg.pool.serves:
            self._legs[leg.pool.submit(leg.handle, leg.request)] = leg
        else:
            self._waiting.append(leg)

    def _send_again(self) -> None:
        """Send what waited for a replica, or lost its own."""
        lost = [self._legs.pop(ticket) for pool in self._pools.values() for ticket in pool.take_lost()]
        legs, self._waiting = [*self._waiting, *lost], []
        for leg in legs:
            self._send(leg)
