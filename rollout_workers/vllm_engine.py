"""Samples seeded completions with log-probabilities by vLLM, whose weights are replaced while requests run."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from vllm.platforms import current_platform

from cluster.config.sections import StudentConfig
from cluster.config.stages import EngineConfig
from cluster.contracts.errors import ActorDiedError, RolloutError
from cluster.contracts.requests import Completion, SamplingSettings
from cluster.contracts.trajectory import Floats, Ints
from cluster.vllm.engine import EngineRole, build_engine
from cluster.vllm.generation import MERGING, NO_LIMIT, generate, prompt_logprobs
from cluster.vllm.sleep_calls import put_to_sleep, wake
from cluster.vllm.weight_sync.updates import EngineUpdates, raised_as_death
from cluster.weight_sync.transports import vllm_backend
from rollout_workers.candidates.sampled import CandidateRequest
from rollout_workers.candidates.vllm_processor import (
    CandidateFetcher,
    Encoded,
    candidates_from_bytes,
    request_candidates,
)

CANDIDATES = "rollout_workers.candidates.vllm_processor"  # the module; vLLM loads its classes by name
PROCESSORS = (f"{CANDIDATES}:CandidateProcessor", f"{CANDIDATES}:CandidateProcessorV2")
WORKER_EXTENSION = "rollout_workers.weight_sync.worker_extension.WorkerExtension"


class SleepWhenIdle:
    """Counts the users of an engine; wakes it for the first, and puts it to sleep after the last.

    `sleep` is asked to keep the weights, but in `rest`. Without `after_last_user`, it is asked in `rest` alone.
    """

    def __init__(
        self,
        sleep: Callable[[bool], Awaitable[Any]],
        wake: Callable[[], Awaitable[Any]],
        after_last_user: bool = True,
    ) -> None:
        self._sleep, self._wake, self._after_last_user = sleep, wake, after_last_user
        self._num_users = 0
        self._is_asleep = False
        self._has_weights = True
        self._lock = asyncio.Lock()  # an engine on its way to sleep, or not quite awake, has no users

    async def begin(self, brings_weights: bool = False) -> None:
        """Add a user; raise ActorDiedError for one that needs the weights when they were given up."""
        async with self._lock:
            if not self._has_weights and not brings_weights:
                raise ActorDiedError("a rollout engine that waits for new weights was asked for a completion")
            if self._is_asleep:
                await self._wake()
                self._is_asleep = False
            self._has_weights = True
            self._num_users += 1

    async def end(self) -> None:
        async with self._lock:
            self._num_users -= 1
            if self._num_users == 0 and self._after_last_user:
                await self._sleep(True)
                self._is_asleep = True

    async def rest(self) -> None:
        """Sleep without weights until others come, unless the engine is in use."""
        async with self._lock:
            if self._num_users == 0 and not self._is_asleep:
                await self._sleep(False)
                self._is_asleep, self._has_weights = True, False

    @asynccontextmanager
    async def awake(self) -> AsyncIterator[None]:
        """Use the engine for as long as a `with` statement lasts."""
        await self.begin()
        try:
            yield
        finally:
            await self.end()


class VllmRolloutEngine:
    """Runs the student in vLLM as a RolloutEngine; build it inside a running event loop."""

    def __init__(
        self,
        student: StudentConfig,
        engine: EngineConfig,
        max_model_len: int,
        transport: str | None,
        sampled_candidates: bool = False,
        merges_stops: bool = False,
        keeps_cache: bool = False,
        float32_head: bool = False,
        rests: bool = False,
    ) -> None:
        """Start the engine; requests may want sampled candidates, or a class of stop ids, if it is said here.

        One that `rests` sleeps when it is asked to (`rest`); else, if it sleeps at all, whenever it has no request.
        """
        self._policy_version = 0  # of the weights that sample; 0: those that vLLM loaded
        self._candidates = CandidateFetcher(self._take_candidates) if sampled_candidates else None
        self._engine = build_engine(
            student.model,
            student.trust_remote_code,
            engine,
            EngineRole(
                max_model_len=max_model_len,
                logprobs_mode="processed_logprobs",
                max_logprobs=NO_LIMIT,
                prefix_caching=True,
                tokenizer=True,
                priorities=True,
                sleeps=engine.sleep,
                keeps_cache=keeps_cache,
                float32_head=float32_head,
                weight_transfer_backend=vllm_backend(transport) if transport else None,
                worker_extension=WORKER_EXTENSION,
                logits_processors=(MERGING,) * merges_stops + (PROCESSORS,) * sampled_candidates,
            ),
        )
        self._updates = EngineUpdates(self._engine, "rollout")
        self._sleeps = engine.sleep and current_platform.is_sleep_mode_available()
        self._use = SleepWhenIdle(self._sleep, self._wake, after_last_user=not rests)

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        """Sample one completion; a stop string's own tokens stay, for the student sampled them.

        Raises:
            RolloutError: vLLM refuses the request or gives it up.
            ActorDiedError: the engine's process is gone.
        """
        wants_candidates = sampling.candidates == "sampled" and bool(sampling.num_candidates)
        if wants_candidates and self._candidates is None:
            raise RolloutError(f"request {request_id} wants sampled candidates, but its engine was started without")
        count, version = sampling.num_candidates, lambda: self._policy_version
        fetcher = self._candidates if wants_candidates else None
        extra = request_candidates(CandidateRequest(request_id, count, seed)) if fetcher else None
        async with self._use.awake():
            try:
                completion = await generate(
                    self._engine, "rollout", request_id, prompt_ids, sampling, seed, priority, version, extra
                )
            except BaseException:
                if fetcher:
                    fetcher.give_up(request_id)
                raise
            return completion if fetcher is None else await _with_candidates(fetcher, request_id, completion, count)

    async def prompt_logprobs(
        self, request_id: str, token_ids: Ints, places: Ints, count: int, priority: int
    ) -> tuple[Ints, Floats]:
        """Score given tokens; vLLM leaves its prefix cache out of it.

        Raises:
            ScoreError: vLLM refuses the request or gives it up.
            ActorDiedError: the engine's process is gone.
        """
        async with self._use.awake():
            return await prompt_logprobs(self._engine, "rollout", request_id, token_ids, places, count, priority)

    @property
    def is_dead(self) -> bool:
        return bool(self._engine.errored)

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        await self._updates.init_weight_transfer(init_info)

    async def start_weight_update(self) -> None:
        if not self._updates.is_under_way:
            await self._use.begin(brings_weights=True)
        await self._updates.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        await self._updates.update_weights(update_info)

    async def finish_weight_update(self, policy_version: int) -> str:
        checksum = await self._updates.install(policy_version)
        self._policy_version = policy_version
        await self._updates.resume()
        await self._use.end()
        return checksum

    async def rest(self, policy_version: int) -> None:
        """Give all GPU memory back until new weights come, unless some came after this version, or requests run."""
        if self._sleeps and self._policy_version <= policy_version:
            await self._use.rest()

    async def shutdown(self) -> None:
        self._engine.shutdown()

    async def _sleep(self, keeps_weights: bool) -> None:
        if self._sleeps:
            with raised_as_death("rollout"):
                await put_to_sleep(self._engine, keeps_weights)

    async def _wake(self) -> None:
        if self._sleeps:
            with raised_as_death("rollout"):
                await wake(self._engine)

    async def _take_candidates(self, wanted: Mapping[str, int], given_up: list[str]) -> dict[str, Encoded]:
        # Every rank of the engine samples the same candidates; all of them forget.
        [taken, *_] = await self._engine.collective_rpc("take_candidates", args=(wanted, given_up))
        return {key: (ids, logprobs) for key, (ids, logprobs) in taken.items()}


async def _with_candidates(
    fetcher: CandidateFetcher, request_id: str, completion: Completion, count: int
) -> Completion:
    num_tokens = len(completion.token_ids)
    ids, logprobs = candidates_from_bytes(*await fetcher.fetch(request_id, num_tokens), count)
    if len(ids) != num_tokens:
        raise RolloutError(f"request {request_id}: vLLM sampled candidates at {len(ids)} of its {num_tokens} tokens")
    return replace(completion, candidate_ids=ids, candidate_logprobs=logprobs)
