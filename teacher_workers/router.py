"""Sends each batch from pool to pool along its route; every pool adds its teacher's columns."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from cluster.actors.cluster import RAY
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import LostBytesError, ScoreError
from teacher_workers.pool import Hop, Route, TeacherPool, TeacherReplicas


class TeacherRouter:
    """Sends batches along their routes.

    `score` waits for all of its batches. A driver that waits for new batches at the same time uses the parts: `submit`,
    then a wait for what `maintain` returns and other references, then `collect`.
    """

    def __init__(self, pools: Mapping[str, TeacherPool], call_seconds: float) -> None:
        """Take the pools by teacher name; `call_seconds` bounds the wait for the next answer."""
        self.pools = dict(pools)  # by teacher name, as they are now
        self._call_seconds = call_seconds
        self._waiting: list[tuple[TeacherPool, Hop]] = []  # no replica of the pool serves
        self._lost: list[BatchHandle] = []

    @property
    def is_idle(self) -> bool:
        """Return whether no batch is being scored or waits for a replica."""
        return not self._waiting and not any(pool.outstanding for pool in self._all_pools())

    def score(self, handles: Iterable[BatchHandle], plan: Callable[[str], Route]) -> Iterator[BatchHandle]:
        """Submit each generated batch as it comes and yield those whose route is done, in any order.

        `plan` returns the route of the batches of a teacher, `handle.teacher`.

        Raises:
            ScoreError: a route names an unknown teacher, or scores cannot be training data.
            LostBytesError: a batch is gone with the node that held it.
            ActorError: replicas died more often than they may, or nothing was scored in time; says what is late.
        """
        for handle in handles:
            self.submit(handle, plan(handle.teacher))
        while not self.is_idle:
            ready = RAY.wait_for_any(self.maintain, self._call_seconds, lambda: f"scores from {self.late()}")
            yield from self.collect(ready)
            if self._lost:
                raise LostBytesError(f"trajectories {self._lost[0].trajectory_ids} are gone with their node")

    def submit(self, handle: BatchHandle, route: Route) -> None:
        """Send a batch to the first pool of its route, of at least one; returns at once."""
        for name, _ in route:
            if name not in self.pools:
                raise ScoreError(f"a batch names the teacher {name!r}; there are {sorted(self.pools)}")
        (name, request), *rest = route
        self._send(self._pool(name, handle.rollout), Hop(handle, request, rest))

    def maintain(self) -> list[Any]:
        """Deal with replicas that died unnoticed, and return references to wait for; `collect` takes those ready."""
        arriving = []
        for replicas in self._all_replicas():
            replicas.maintain()
            arriving += replicas.arriving
        for pool in self._all_pools():
            pool.maintain()
        self._send_again()
        return [*(answer for pool in self._all_pools() for answer in pool.outstanding), *arriving]

    def collect(self, ready: Collection[Any]) -> list[BatchHandle]:
        """Return the batches whose route is done, and send the others on; the errors are those of `score`.

        `ready` may hold other things than references of these pools.
        """
        finished = []
        came = [(pool, answer, scored) for pool in self._all_pools() for answer, scored in pool.fetch(ready).items()]
        for pool, answer, scored in came:
            if answer not in pool.outstanding:  # its replica died meanwhile
                continue
            hop = pool.outstanding[answer]
            try:
                handle = pool.collect(answer, scored)
            except LostBytesError:
                self._lost.append(hop.handle)
                continue
            if handle is None:
                self._send_again()
            elif hop.rest:
                self.submit(handle, hop.rest)
            else:
                finished.append(handle)
        for replicas in self._all_replicas():
            replicas.admit_started(ready)
        self._send_again()
        return finished

    def take_lost(self) -> list[BatchHandle]:
        """Return, once, the batches whose bytes are gone; they must be sampled again."""
        lost, self._lost = self._lost, []
        return lost

    def abandon(self) -> None:
        self._waiting.clear()
        self._lost.clear()
        for pool in self._all_pools():
            pool.abandon()

    def late(self) -> str:
        return ", ".join(names for pool in self._all_pools() if (names := pool.late()))

    def shutdown(self) -> None:
        for replicas in self._all_replicas():
            replicas.shutdown()

    def _pool(self, name: str, step: int) -> TeacherPool:
        """Return the pool that scores for a teacher in a step; a step below 0 is an evaluation's."""
        return self.pools[name]

    def _all_pools(self) -> list[TeacherPool]:
        return list(self.pools.values())

    def _all_replicas(self) -> list[TeacherReplicas]:
        """Return the replicas of all pools, each once: those of a slot are of several pools."""
        return list({id(pool.replicas): pool.replicas for pool in self._all_pools()}.values())

    def _send(self, pool: TeacherPool, hop: Hop) -> None:
        if pool.replicas.serving:
            pool.submit(hop)
        else:
            self._waiting.append((pool, hop))

    def _send_again(self) -> None:
        lost = [(pool, hop) for pool in self._all_pools() for hop in pool.take_lost()]
        waiting, self._waiting = [*self._waiting, *lost], []
        for pool, hop in waiting:
            self._send(pool, hop)
