"""The teacher pools: per teacher, Ray actors with one TeacherWorker each. The only file here that knows Ray.

Importing this loads no vLLM: the driver never needs it, and an actor sets vLLM's environment first.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray

from cluster import actors
from cluster.actors import PoolTimeouts
from cluster.batch_store import STORE_ENVIRONMENT, add_environment, pack
from cluster.contracts.config import TeacherConfig
from cluster.contracts.errors import ActorError, ScoreError
from cluster.contracts.interfaces import BatchHandle
from cluster.contracts.trajectory import from_wire
from cluster.vllm_runtime import prepare_environment
from teacher_workers.worker import TeacherWorker


@dataclass(frozen=True)
class _Assignment:
    replica: int
    handle: BatchHandle  # as generated
    wire: Any  # reference to the scored batch's bytes

    @property
    def num_tokens(self) -> int:
        return sum(self.handle.num_tokens)


class TeacherActor:
    """Runs one TeacherWorker in an actor and keeps trajectory bytes in the object store."""

    def __init__(self, name: str, teacher: TeacherConfig, max_model_len: int) -> None:
        self._name = name
        self._teacher = teacher
        self._max_model_len = max_model_len

    async def start(self) -> None:
        """Build engine and worker; here and not in the constructor, because the engine belongs to the event loop."""
        prepare_environment(self._teacher.engine)
        from teacher_workers.vllm_engine import VllmScoringEngine

        engine = VllmScoringEngine(self._teacher, self._max_model_len)
        top_k = self._teacher.top_k if self._teacher.signal == "topk" else 0
        self._worker = TeacherWorker(self._name, engine, engine.vocabulary_size, top_k)

    async def score(self, wire: pa.Buffer) -> tuple[pa.Buffer, BatchHandle]:
        """Score one batch; Ray has fetched its bytes to this node before the call."""
        return pack(*await self._worker.score(from_wire(wire, "generated")))

    async def shutdown(self) -> None:
        """End the engine's processes."""
        if hasattr(self, "_worker"):
            await self._worker.shutdown()


class TeacherPool:
    """The replicas of one teacher; each batch goes to the one with the fewest tokens still to score."""

    def __init__(
        self,
        name: str,
        teacher: TeacherConfig,
        max_model_len: int,
        options: Sequence[Mapping[str, Any]],
        timeouts: PoolTimeouts,
    ) -> None:
        """Begin to start one actor per entry of `options` (Ray's actor options), named teacher-NAME-0, and so on."""
        self.name = name
        self._names = [f"teacher-{name}-{index}" for index in range(len(options))]
        self._timeouts = timeouts
        arguments = [(actor_name, teacher, max_model_len) for actor_name in self._names]
        options = [add_environment(option, STORE_ENVIRONMENT) for option in options]
        self._actors = actors.create_actors(TeacherActor, self._names, arguments, options)
        self._starting = [actor.start.remote() for actor in self._actors]
        self._outstanding: dict[Any, _Assignment] = {}

    @property
    def outstanding(self) -> list[Any]:
        """Return references to the answers that have not been collected."""
        return list(self._outstanding)

    def wait_until_ready(self) -> None:
        """Wait for every engine.

        Raises:
            ModelError: vLLM cannot serve the teacher.
            ActorError: an actor died or took too long; says which.
        """
        actors.get_all(self._starting, self._timeouts.start_seconds, f"teacher {self.name} to start", self._names)

    def submit(self, handle: BatchHandle) -> None:
        """Send a generated batch to the least loaded replica; returns at once."""
        loads = [0] * len(self._actors)
        for assignment in self._outstanding.values():
            loads[assignment.replica] += assignment.num_tokens
        replica = least_loaded(loads)
        wire, answer = self._score(replica, handle)
        self._outstanding[answer] = _Assignment(replica, handle, wire)

    def collect(self, timeout_seconds: float) -> list[BatchHandle]:
        """Return the batches that are scored, waiting for one if none is; none after the timeout.

        Raises:
            ScoreError: a replica's scores cannot be training data; names teacher and replica.
            ActorError: a replica died.
        """
        if not self._outstanding:
            return []
        first, _ = ray.wait(self.outstanding, num_returns=1, timeout=timeout_seconds)
        others, _ = ray.wait(self.outstanding, num_returns=len(self._outstanding), timeout=0)
        return [self._take(answer) for answer in {*first, *others}]

    def score_everywhere(self, handles: Sequence[BatchHandle]) -> list[list[BatchHandle]]:
        """Score the same batches on every replica, to compare them; one list per replica, in the batches' order."""
        everywhere = []
        for replica, name in enumerate(self._names):
            asked = [self._score(replica, handle) for handle in handles]
            waiting_for = f"scores from {name}"
            scored = actors.get([answer for _, answer in asked], self._timeouts.call_seconds, waiting_for)
            everywhere.append(
                [replace(handle, reference=wire) for handle, (wire, _) in zip(scored, asked, strict=True)]
            )
        return everywhere

    def late(self) -> str:
        """Name the replicas that owe an answer."""
        return ", ".join(self._names[index] for index in sorted({a.replica for a in self._outstanding.values()}))

    def shutdown(self) -> None:
        """End engines and actors; no process stays."""
        actors.shutdown(self._actors)

    def _take(self, answer: Any) -> BatchHandle:
        assignment = self._outstanding.pop(answer)
        waiting_for = f"scores from {self._names[assignment.replica]}"
        scored: BatchHandle = actors.get(answer, self._timeouts.call_seconds, waiting_for)
        metrics = {**assignment.handle.metrics, **scored.metrics}
        return replace(scored, reference=assignment.wire, metrics=metrics)

    def _score(self, replica: int, handle: BatchHandle) -> tuple[Any, Any]:
        """Return references to the scored bytes and to their handle."""
        wire, answer = self._actors[replica].score.options(num_returns=2).remote(handle.reference)
        return wire, answer


class TeacherPools:
    """All teachers of a run; each batch is scored by the one that its prompt names."""

    def __init__(self, pools: Mapping[str, TeacherPool], call_seconds: float) -> None:
        """Take the pools by teacher name; `call_seconds` bounds the wait for the next scored batch."""
        self._pools = pools
        self._call_seconds = call_seconds

    @property
    def pools(self) -> Mapping[str, TeacherPool]:
        """Return the pools by teacher name."""
        return self._pools

    def score(self, handles: Iterable[BatchHandle]) -> Iterator[BatchHandle]:
        """Submit each batch as it comes and yield scored ones as they finish, in any order.

        Raises:
            ScoreError: a batch names an unknown teacher, or scores cannot be training data.
            ActorError: a replica died, or nothing was scored in time; says what is late.
        """
        for handle in handles:
            if handle.teacher not in self._pools:
                raise ScoreError(f"a batch names the teacher {handle.teacher!r}; there are {sorted(self._pools)}")
            self._pools[handle.teacher].submit(handle)
            yield from self._finished()
        while answers := [answer for pool in self._pools.values() for answer in pool.outstanding]:
            ready, _ = ray.wait(answers, num_returns=1, timeout=self._call_seconds)
            if not ready:
                late = ", ".join(pool.late() for pool in self._pools.values() if pool.outstanding)
                raise ActorError(f"waited {self._call_seconds:.0f} s for scores from {late}")
            yield from self._finished()

    def shutdown(self) -> None:
        """End every pool."""
        for pool in self._pools.values():
            pool.shutdown()

    def _finished(self) -> Iterator[BatchHandle]:
        for pool in self._pools.values():
            yield from pool.collect(timeout_seconds=0)


def least_loaded(outstanding_tokens: Sequence[int]) -> int:
    """Return the replica with the fewest tokens still to score; the first of equals.

    Example:
        >>> least_loaded([40, 10, 10])
        1
    """
    return min(range(len(outstanding_tokens)), key=outstanding_tokens.__getitem__)
