"""The rollout pool: Ray actors, each with one RolloutWorker on vLLM. The only file here that knows Ray.

Importing this loads no vLLM: the driver never needs it, and an actor sets vLLM's environment first.
"""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle

from cluster import actors
from cluster.actors import PoolTimeouts
from cluster.batch_store import STORE_ENVIRONMENT, add_environment, pack
from cluster.contracts.config import EngineConfig, StudentConfig
from cluster.contracts.errors import ActorError
from cluster.contracts.interfaces import BatchHandle, RolloutRequest, SamplingSettings
from cluster.vllm_runtime import prepare_environment
from rollout_workers.expected_lengths import ExpectedLengths, spread
from rollout_workers.prompts import PromptSet
from rollout_workers.worker import RolloutWorker, WrittenBatch


@dataclass(frozen=True)
class RolloutActorSettings:
    """What one actor needs to start; equal for all actors of a pool."""

    student: StudentConfig
    engine: EngineConfig
    max_model_len: int  # tokens of the longest prompt and completion, plus 1
    rows_per_batch: int
    weight_sync_backend: str | None  # None: the weights never change
    draws: bool = False  # whether sampling settings may ask for candidate draws


@dataclass(frozen=True)
class _Awaited:
    worker: int
    rollout: int


class RolloutActor:
    """Runs one RolloutWorker in an actor and keeps trajectory bytes in the object store."""

    def __init__(self, settings: RolloutActorSettings) -> None:
        self._settings = settings
        self._rollouts: dict[int, AsyncIterator[WrittenBatch]] = {}
        self._held_version: int | None = None
        self._arriving_version: int | None = None

    async def start(self) -> None:
        """Build engine and worker; here and not in the constructor, because the engine belongs to the event loop."""
        settings = self._settings
        prepare_environment(settings.engine)
        from transformers import AutoTokenizer

        from rollout_workers.vllm_engine import VllmRolloutEngine

        tokenizer = AutoTokenizer.from_pretrained(
            settings.student.model, trust_remote_code=settings.student.trust_remote_code
        )
        engine = VllmRolloutEngine(
            settings.student, settings.engine, settings.max_model_len, settings.weight_sync_backend, settings.draws
        )
        self._worker = RolloutWorker(
            engine, lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), settings.rows_per_batch
        )

    async def set_prompts(self, wire: pa.Buffer) -> None:
        """Replace the prompts; Ray hands every actor of a node the same bytes."""
        self._worker.set_prompts(PromptSet.from_wire(wire))

    async def start_rollout(
        self, rollout_id: int, requests: Sequence[RolloutRequest], sampling: SamplingSettings, verifier: str
    ) -> tuple[pa.Buffer, BatchHandle]:
        """Hand all requests, at least one, to the engine and return the first batch, as `next_batch` does.

        Requests of a rollout with a lower id run first.
        """
        self._rollouts[rollout_id] = self._worker.generate(requests, sampling, verifier, priority=rollout_id)
        return await self.next_batch(rollout_id)

    async def next_batch(self, rollout_id: int) -> tuple[pa.Buffer, BatchHandle]:
        """Return the rollout's next batch, waiting for it; none may be asked for after the last."""
        written = await anext(self._rollouts[rollout_id])
        if written.is_last:
            del self._rollouts[rollout_id]
        wire, handle = pack(written.rows, written.metrics)
        return wire, replace(handle, is_last=written.is_last)

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Open the receiving end of the weight sync."""
        await self._worker.init_weight_transfer(init_info)

    async def held_version(self) -> int | None:
        """Return the policy version whose changes alone this worker can take; None: it needs whole parameters."""
        return self._held_version

    async def start_weight_update(self, first: Sequence[Any] = ()) -> None:
        """Pause generation and make the engine ready to receive, once the objects of `first` are on this node."""
        for reference in first:
            await reference
        self._held_version = self._arriving_version = None
        await self._worker.start_weight_update()

    async def update_weights(self, update_info: Any) -> None:
        """Receive one bucket; a `reference` (in a list, so that Ray leaves it alone) is fetched to become `buffer`."""
        if self._settings.weight_sync_backend == "object_store":
            [reference] = update_info["reference"]
            kept = {name: value for name, value in update_info.items() if name != "reference"}
            update_info = kept | {"buffer": await reference}
            self._arriving_version = update_info.get("kept_as")
        await self._worker.update_weights(update_info)

    async def finish_weight_update(self, policy_version: int) -> str:
        """Install the weights as `policy_version`, go on generating, and return their checksum."""
        checksum = await self._worker.finish_weight_update(policy_version)
        self._held_version = self._arriving_version
        return checksum

    async def shutdown(self) -> None:
        """End the engine's processes."""
        if hasattr(self, "_worker"):
            await self._worker.shutdown()


class RolloutPool:
    """Spreads requests over rollout actors and hands back batches as they finish anywhere."""

    def __init__(
        self,
        settings: RolloutActorSettings,
        options: Sequence[Mapping[str, Any]],
        timeouts: PoolTimeouts,
        name: str = "rollout",
        actor: type = RolloutActor,
        create: Callable[..., list[ActorHandle]] = actors.create_actors,
    ) -> None:
        """Begin to start the actors.

        Args:
            settings: what each is given.
            options: Ray's actor options, one entry per actor.
            timeouts: how long to wait for them.
            name: they are called `name`-0, `name`-1, ...
            actor: another class with RolloutActor's methods, to run the pool without its engines.
            create: makes the actors, as `create_actors` does.
        """
        self._names = [f"{name}-{index}" for index in range(len(options))]
        self._timeouts = timeouts
        self._name = name
        options = [add_environment(option, STORE_ENVIRONMENT) for option in options]
        self._actors = create(actor, self._names, [(settings,)] * len(options), options)
        self._lengths = ExpectedLengths(lambda prompt_id: "")
        self._rollout_ids = count(-1, -1)  # below every step, so that who waits for `generate` waits for it alone
        self._awaited: dict[Any, tuple[_Awaited, Any]] = {}  # reference to a handle -> for whom, reference to its bytes
        self._starting = [actor.start.remote() for actor in self._actors]

    @property
    def actors(self) -> list[ActorHandle]:
        """Return the actors, whose weight verbs the learner's sender calls."""
        return self._actors

    def wait_until_ready(self) -> None:
        """Wait for every engine.

        Raises:
            ModelError: vLLM cannot serve the model.
            ActorError: an actor died or took too long; says which.
        """
        actors.get_all(self._starting, self._timeouts.start_seconds, f"pool {self._name} to start", self._names)

    def set_prompts(self, prompts: PromptSet) -> None:
        """Give every actor the prompts; their bytes go into the object store once."""
        wire = ray.put(prompts.to_wire())
        self._call_all("set_prompts", wire)
        self._lengths = ExpectedLengths(prompts.domain)

    def submit(
        self, rollout: int, requests: Sequence[RolloutRequest], sampling: SamplingSettings, verifier: str
    ) -> None:
        """Hand requests to the workers, those expected to be long first, and return at once.

        Args:
            rollout: a number that no running rollout has, in training the step; a worker that cannot run all its
                requests together runs those of the lowest number first.
            requests: the completions to draw.
            sampling: how to draw.
            verifier: which verifier gives the rewards.
        """
        for worker, share in enumerate(spread(requests, len(self._actors), self._lengths.expect)):
            if share:
                self._ask(_Awaited(worker, rollout), "start_rollout", rollout, share, sampling, verifier)

    @property
    def awaited(self) -> list[Any]:
        """Return a reference for each worker and rollout that owes a batch; it is ready when the batch is."""
        return list(self._awaited)

    def take(self, reference: Any) -> BatchHandle:
        """Return the batch of an awaited reference, which must be ready, and ask its worker for the next one, if any.

        Raises:
            RolloutError: an engine gave up a request.
            ActorError: the worker died.
        """
        asked, wire = self._awaited.pop(reference)
        waiting_for = f"a batch from {self._names[asked.worker]}"
        handle: BatchHandle = actors.get(reference, self._timeouts.call_seconds, waiting_for)
        self._lengths.observe(handle)
        if not handle.is_last:
            self._ask(asked, "next_batch", asked.rollout)
        return replace(handle, reference=wire, rollout=asked.rollout)

    def late(self) -> str:
        """Name the workers that owe a batch."""
        return ", ".join(
            self._names[worker] for worker in sorted({asked.worker for asked, _ in self._awaited.values()})
        )

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: SamplingSettings, verifier: str
    ) -> Iterator[BatchHandle]:
        """Yield every requested trajectory once, in batches, in the order in which they finish; nothing else may run.

        Raises:
            RolloutError: an engine gave up a request.
            ActorError: an actor died, or none finished a batch in time; says which are late.
        """
        self.submit(next(self._rollout_ids), requests, sampling, verifier)
        while self._awaited:
            ready, _ = ray.wait(self.awaited, num_returns=1, timeout=self._timeouts.call_seconds)
            if not ready:
                raise ActorError(
                    f"waited {self._timeouts.call_seconds:.0f} s for a batch of trajectories from {self.late()}"
                )
            yield self.take(ready[0])

    def _ask(self, asked: _Awaited, method: str, *args: Any) -> None:
        """Ask a worker for a batch; the key is the reference to its handle."""
        wire, handle = getattr(self._actors[asked.worker], method).options(num_returns=2).remote(*args)
        self._awaited[handle] = (asked, wire)

    def shutdown(self) -> None:
        """End engines and actors; no process stays."""
        actors.shutdown(self._actors)

    def _call_all(self, method: str, *args: Any) -> list[Any]:
        return actors.call_all(
            self._actors,
            method,
            *args,
            timeout_seconds=self._timeouts.call_seconds,
            waiting_for=f"{method} in pool {self._name}",
            names=self._names,
        )
