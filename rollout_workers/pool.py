"""The rollout pool: Ray actors, each with one RolloutWorker on vLLM. The only file here that knows Ray.

Importing this loads no vLLM: the driver never needs it, and an actor sets vLLM's environment first.
"""

from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
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
from cluster.contracts.metrics import Metrics
from cluster.vllm_runtime import prepare_environment
from rollout_workers.prompts import PromptSet
from rollout_workers.worker import RolloutWorker


@dataclass(frozen=True)
class RolloutActorSettings:
    """What one actor needs to start; equal for all actors of a pool."""

    student: StudentConfig
    engine: EngineConfig
    max_model_len: int  # tokens of the longest prompt and completion, plus 1
    rows_per_batch: int
    weight_sync_backend: str | None  # None: the weights never change


@dataclass(frozen=True)
class _Awaited:
    worker: int
    wire: Any  # reference to the bytes of the batch that was asked for


class RolloutActor:
    """Runs one RolloutWorker in an actor and keeps trajectory bytes in the object store."""

    def __init__(self, settings: RolloutActorSettings) -> None:
        self._settings = settings
        self._rollouts: dict[int, AsyncIterator[tuple[pa.RecordBatch, Metrics]]] = {}

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
            settings.student, settings.engine, settings.max_model_len, settings.weight_sync_backend
        )
        self._worker = RolloutWorker(
            engine, lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), settings.rows_per_batch
        )

    async def set_prompts(self, wire: pa.Buffer) -> None:
        """Replace the prompts; Ray hands every actor of a node the same bytes."""
        self._worker.set_prompts(PromptSet.from_wire(wire))

    async def start_rollout(
        self, rollout_id: int, requests: Sequence[RolloutRequest], sampling: SamplingSettings, verifier: str
    ) -> tuple[pa.Buffer | None, BatchHandle | None]:
        """Hand all requests to the engine and return the first batch that finishes, as `next_batch` does."""
        self._rollouts[rollout_id] = self._worker.generate(requests, sampling, verifier)
        return await self.next_batch(rollout_id)

    async def next_batch(self, rollout_id: int) -> tuple[pa.Buffer | None, BatchHandle | None]:
        """Return the rollout's next batch, waiting for it; two times None when there is none left."""
        made = await anext(self._rollouts[rollout_id], None)
        if made is None:
            del self._rollouts[rollout_id]
            return None, None
        return pack(*made)

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Open the receiving end of the weight sync."""
        await self._worker.init_weight_transfer(init_info)

    async def start_weight_update(self) -> None:
        """Pause generation and make the engine ready to receive."""
        await self._worker.start_weight_update()

    async def update_weights(self, update_info: Any) -> None:
        """Receive one bucket; a `reference` (in a list, so that Ray leaves it alone) is fetched to become `buffer`."""
        if self._settings.weight_sync_backend == "object_store":
            [reference] = update_info["reference"]
            kept = {name: value for name, value in update_info.items() if name != "reference"}
            update_info = kept | {"buffer": await reference}
        await self._worker.update_weights(update_info)

    async def finish_weight_update(self, policy_version: int) -> str:
        """Install the weights as `policy_version`, go on generating, and return their checksum."""
        return await self._worker.finish_weight_update(policy_version)

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
    ) -> None:
        """Begin to start one actor per entry of `options` (Ray's actor options), named `name`-0, `name`-1, ..."""
        self._names = [f"{name}-{index}" for index in range(len(options))]
        self._timeouts = timeouts
        self._name = name
        options = [add_environment(option, STORE_ENVIRONMENT) for option in options]
        self._actors = actors.create_actors(RolloutActor, self._names, [(settings,)] * len(options), options)
        self._rollout_ids = count()
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

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: SamplingSettings, verifier: str
    ) -> Iterator[BatchHandle]:
        """Yield every requested trajectory once, in batches, in the order in which they finish.

        Raises:
            RolloutError: an engine gave up a request.
            ActorError: an actor died, or none finished a batch in time; says which are late.
        """
        rollout_id = next(self._rollout_ids)
        awaited: dict[Any, _Awaited] = {}
        for worker, share in enumerate(spread(requests, len(self._actors))):
            if share:
                awaited |= self._ask(worker, "start_rollout", rollout_id, share, sampling, verifier)
        while awaited:
            ready, _ = ray.wait(list(awaited), num_returns=1, timeout=self._timeouts.call_seconds)
            if not ready:
                late = ", ".join(self._names[batch.worker] for batch in awaited.values())
                raise ActorError(f"waited {self._timeouts.call_seconds:.0f} s for a batch of trajectories from {late}")
            batch = awaited.pop(ready[0])
            handle = actors.get(ready[0], self._timeouts.call_seconds, f"a batch from {self._names[batch.worker]}")
            if handle is not None:
                awaited |= self._ask(batch.worker, "next_batch", rollout_id)
                yield replace(handle, reference=batch.wire)

    def _ask(self, worker: int, method: str, *args: Any) -> dict[Any, "_Awaited"]:
        """Ask a worker for a batch; the key is the reference to its handle."""
        wire, handle = getattr(self._actors[worker], method).options(num_returns=2).remote(*args)
        return {handle: _Awaited(worker, wire)}

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


def spread(requests: Sequence[RolloutRequest], num_workers: int) -> list[list[RolloutRequest]]:
    """Deal requests to workers as evenly as keeping a prompt's samples together, to share its prefix, allows.

    Example:
        >>> [len(share) for share in spread([RolloutRequest(i, i // 2, i % 2, 0) for i in range(6)], 2)]
        [4, 2]
    """
    by_prompt: dict[int, list[RolloutRequest]] = defaultdict(list)
    for request in requests:
        by_prompt[request.prompt_id].append(request)
    shares: list[list[RolloutRequest]] = [[] for _ in range(num_workers)]
    for group in by_prompt.values():
        min(shares, key=len).extend(group)
    return shares
