"""All teachers of a run: each batch goes from pool to pool along its chain, and each adds its columns.

A pool may have a successor, of another checkpoint: it starts beside the others, and from a step on it takes all batches
of that step and later ones, while those of earlier steps stay with the pool that they began with.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.actors.cluster import RAY
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import LostBytesError, PreceptorError, ScoreError
from cluster.contracts.requests import ScoreRequest
from teacher_workers.pool import Scorers, TeacherPool, Ticket

Chain = Sequence[tuple[str, ScoreRequest]]  # who scores a batch, in order, and what is asked of each: pool, request


@dataclass(frozen=True)
class _Leg:
    pool: TeacherPool  # scores now
    handle: BatchHandle
    request: ScoreRequest
    rest: Chain  # scores after it


@dataclass
class Successors:
    """Pools that are to follow those of the same names; they share their replicas, and get no batch yet."""

    pools: Mapping[str, TeacherPool]
    takes_places: bool = False  # whether there is no room for them beside the others
    num_lent: int = 0  # workers of the others that left to make room for the first of these
    error: PreceptorError | None = None  # why they cannot
    due: float = math.inf  # on the driver's clock: when they are given up unless one of them serves

    @property
    def scorers(self) -> Scorers:
        """Return their replicas."""
        return next(iter(self.pools.values())).scorers


@dataclass(frozen=True)
class _Former:
    """Pools that were followed by others."""

    pools: Mapping[str, TeacherPool]
    scorers: Scorers
    until_step: int  # first step that is not theirs


class TeacherPools:
    """Sends batches along their chains.

    `score` is the whole of it for who has nothing else to wait for. A driver that waits for new batches at the same
    time uses the parts: `submit`, then a wait for what `maintain` returns and whatever else, then `collect`.
    """

    def __init__(self, pools: Mapping[str, TeacherPool], call_seconds: float) -> None:
        """Take the pools by teacher name; `call_seconds` bounds the wait for the next answer."""
        self._pools = dict(pools)
        self._former: list[_Former] = []  # in the order in which they were followed
        self._successors: list[Successors] = []
        self._call_seconds = call_seconds
        self._legs: dict[Ticket, _Leg] = {}
        self._waiting: list[_Leg] = []  # no replica of their pools serves
        self._lost: list[BatchHandle] = []

    @property
    def pools(self) -> Mapping[str, TeacherPool]:
        """Return the pools by teacher name, as they are now."""
        return self._pools

    @property
    def successors(self) -> Sequence[Successors]:
        """Return the pools that are to follow others."""
        return self._successors

    def prepare(self, successors: Successors) -> None:
        """Look after pools that are to follow others; what goes wrong with them is noted there and ends nothing."""
        self._successors.append(successors)

    def dismiss(self, successors: Successors) -> None:
        """End pools that were to follow others, which get back what they lent."""
        self._successors.remove(successors)
        successors.scorers.end()
        of_now = self._pools[next(iter(successors.pools))]
        of_now.resize(of_now.size + successors.num_lent)

    def succeed(self, successors: Successors, first_step: int) -> None:
        """Let pools follow those of the same names, from a step on that nothing was asked for yet."""
        former = {name: self._pools[name] for name in successors.pools}
        scorers = next(iter(former.values())).scorers
        self._former.append(_Former(former, scorers, first_step))
        successors.scorers.resize(scorers.size + successors.num_lent)  # it may have been scaled meanwhile
        self._pools.update(successors.pools)
        self._successors.remove(successors)

    def close(self, next_step: int) -> None:
        """Let the replicas leave that only steps before `next_step` may need, which are learned from."""
        for former in self._former:
            if former.until_step <= next_step and former.scorers.size:
                former.scorers.resize(0)

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
            yield from self.collect(RAY.wait_for_any(self.maintain, self._call_seconds, self._waited_for))
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
        self._send(_Leg(self._pool(name, handle.rollout), handle, request, rest))

    def maintain(self) -> list[Any]:
        """Deal with replicas that died unnoticed, and return references to wait for; `collect` takes those ready.

        Raises:
            ActorError: replicas died more often than they may.
        """
        arriving = [reference for scorers in self._scorers() for reference in scorers.maintain()]
        for successors in self._successors:
            arriving += _maintain(successors)
        for pool in self._everyone():
            pool.maintain()
        self._former = [former for former in self._former if not former.scorers.is_gone]
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
        for scorers in self._scorers():
            scorers.admit_started(ready)
        for successors in self._successors:
            _admit_started(successors, ready)
        self._send_again()
        return finished

    def take_lost(self) -> list[BatchHandle]:
        """Return, once, the batches whose bytes are gone; they must be written again."""
        lost, self._lost = self._lost, []
        return lost

    def abandon(self) -> None:
        """Forget all batches that are being scored; steps that are done again belong to the pools of now."""
        self._legs.clear()
        self._waiting.clear()
        self._lost.clear()
        for pool in self._everyone():
            pool.abandon()
        self._former = [replace(former, until_step=0) for former in self._former]
        self.close(next_step=0)

    def late(self) -> str:
        """Name the replicas that owe an answer."""
        return ", ".join(names for pool in self._everyone() if (names := pool.late()))

    def shutdown(self) -> None:
        """End every pool."""
        for successors in self._successors:
            successors.scorers.end()
        for scorers in self._scorers():
            scorers.shutdown()

    def _pool(self, name: str, step: int) -> TeacherPool:
        """Return who scores for a teacher in a step; what belongs to none, below 0, is for the pool of now."""
        for former in self._former:
            if name in former.pools and 0 <= step < former.until_step:
                return former.pools[name]
        return self._pools[name]

    def _everyone(self) -> list[TeacherPool]:
        return [*self._pools.values(), *(pool for former in self._former for pool in former.pools.values())]

    def _scorers(self) -> list[Scorers]:
        """Return the replicas of now and before, each once."""
        of_now = {id(pool.scorers): pool.scorers for pool in self._pools.values()}
        return [*of_now.values(), *(former.scorers for former in self._former)]

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
        lost = [self._legs.pop(ticket) for pool in self._everyone() for ticket in pool.take_lost()]
        legs, self._waiting = [*self._waiting, *lost], []
        for leg in legs:
            self._send(leg)


def _maintain(successors: Successors) -> list[Any]:
    try:
        return [] if successors.error else successors.scorers.maintain()
    except PreceptorError as error:
        successors.error = error
        return []


def _admit_started(successors: Successors, ready: Collection[Any]) -> None:
    try:
        if not successors.error:
            successors.scorers.admit_started(ready)
    except PreceptorError as error:
        successors.error = error
