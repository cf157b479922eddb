"""Runs one RolloutWorker in each Ray actor of the rollout pool, behind calls that pass bytes and handles.

Importing this loads no vLLM: the driver never needs it, and an actor sets vLLM's environment first.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from cluster.actors.liveness import end_with_engine
from cluster.actors.object_store import pack
from cluster.config.sections import HARNESS_KINDS, EnvironmentConfig, PromptsConfig, StudentConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import RolloutError
from cluster.contracts.pieces import Pieces
from cluster.contracts.protocols import Generator, RolloutEngine
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from cluster.contracts.trajectory import Floats, Ints
from cluster.vllm.weight_sync.served_weights import ServedWeights
from cluster.vllm.weight_sync.updates import WeightVerbs
from rollout_workers.contexts.builder import ContextBuilder
from rollout_workers.environments.base import Services, environment_named
from rollout_workers.environments.chat import Chat
from rollout_workers.environments.tool_calls import reader_of
from rollout_workers.environments.verifier_process import VerifierProcess
from rollout_workers.episode import Limits
from rollout_workers.pool import RolloutActorSettings
from rollout_workers.privileged import PrivilegedSampler, PrivilegedSettings, TeacherEngine
from rollout_workers.prompts import PromptSet
from rollout_workers.worker import RolloutBatch, RolloutWorker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rollout_workers.harness.environment import HarnessRuntime

BEFORE_ALL = -(2**31)  # the priority of scores: an update of the weights waits for them
REMEMBERED_TEXTS = 1024  # that environments add again and again, such as a hint; each is tokenised once


class RolloutActor(WeightVerbs):
    """Runs one RolloutWorker in an actor and keeps trajectory bytes in the object store."""

    _engine: RolloutEngine
    _served: ServedWeights

    def __init__(self, settings: RolloutActorSettings) -> None:
        self._settings = settings
        self._rollouts: dict[int, AsyncGenerator[RolloutBatch]] = {}
        self._running: dict[int, asyncio.Task[RolloutBatch]] = {}  # waits for the next batch of a call
        self._watching: asyncio.Task[None] | None = None  # None: there is no engine yet
        self._scores = count(1)

    @property
    def weights(self) -> ServedWeights:
        return self._served

    async def start(self) -> None:
        """Build engine and worker; here and not in the constructor, because the engine belongs to the event loop."""
        from cluster.vllm.engine import prepare_environment

        settings, student = self._settings, self._settings.student
        prepare_environment(settings.engine)
        from transformers import AutoTokenizer

        from rollout_workers.vllm_engine import VllmRolloutEngine

        tokenizer = AutoTokenizer.from_pretrained(student.model, trust_remote_code=student.trust_remote_code)
        engine = VllmRolloutEngine(
            student,
            settings.engine,
            settings.max_model_len,
            settings.weight_transport,
            settings.sampled_candidates,
            settings.merges_stops,
            settings.keeps_cache,
            settings.float32_head,
            settings.rests,
        )
        self._worker = RolloutWorker(
            engine,
            _services(settings, tokenizer),
            settings.rows_per_batch,
            environment_named(settings.environment.kind),
            Limits.of(settings.environment),
            lambda prompts: (
                None if settings.contexts is None else ContextBuilder(settings.contexts, tokenizer, prompts)
            ),
            lambda prompts, engine, sample: (
                None
                if (privileged := settings.privileged) is None
                else PrivilegedSampler(
                    privileged,
                    ContextBuilder(privileged.contexts, tokenizer, prompts),
                    engine,
                    sample,
                    self._writer(privileged),
                )
            ),
        )
        self._engine, self._served = engine, ServedWeights(self._worker)
        self._watching = asyncio.create_task(end_with_engine(lambda: engine.is_dead))

    def _writer(self, privileged: PrivilegedSettings) -> Generator | None:
        """Return the engines of the teacher that writes for hard prompts; None: the student does."""
        teacher = privileged.config.sampler
        if teacher is None:
            return None
        return TeacherEngine(teacher, privileged.retry_seconds, lambda: self._worker.policy_version)

    async def set_prompts(self, wire: pa.Buffer) -> None:
        """Replace the prompts; Ray hands every actor of a node the same bytes."""
        self._worker.set_prompts(PromptSet.from_wire(wire))

    async def start_rollout(
        self, call: int, requests: Sequence[RolloutRequest], sampling: SamplingSettings, priority: int
    ) -> tuple[Pieces, BatchHandle]:
        """Start to sample all requests, at least one, and return the first batch, as `next_batch` does.

        `call` names the rollout in `next_batch`; no two are equal.
        """
        self._rollouts[call] = self._worker.generate(requests, sampling, priority)
        return await self.next_batch(call)

    async def next_batch(self, call: int) -> tuple[Pieces, BatchHandle]:
        """Return the call's next batch, waiting for it; none follows the last. After `abandon`, raise RolloutError."""
        self._running[call] = asyncio.create_task(anext(self._rollouts[call]))
        try:
            rows, metrics, is_last = await self._running[call]
        except asyncio.CancelledError as error:
            raise RolloutError(f"rollout call {call} was abandoned") from error
        finally:
            del self._running[call]
        if is_last:
            del self._rollouts[call]
        wire, handle = pack(rows, metrics)
        return wire, replace(handle, is_last=is_last)

    async def prompt_logprobs(
        self, rows: Sequence[tuple[Ints, Ints]], num_listed: int, newest: int
    ) -> tuple[Ints, Floats, int]:
        """Score token ids at places, as a teacher that has the student's weights; all rows with the same version.

        Returns:
            Ids and log-probabilities, [places of all rows, 1 + num_listed], as `RolloutEngine.prompt_logprobs` has
            them, and the version; nothing where it is below `newest`.
        """
        async with self._served.in_use() as version:
            if version < newest:
                return np.empty((0, 1), np.int32), np.empty((0, 1), np.float32), version
            names, score = [f"score-{next(self._scores)}" for _ in rows], self._engine.prompt_logprobs
            asked = zip(names, rows, strict=True)
            scored = await asyncio.gather(
                *(score(name, ids, places, num_listed, BEFORE_ALL) for name, (ids, places) in asked)
            )
        ids, logprobs = (np.concatenate(part) for part in zip(*scored, strict=True))
        return ids, logprobs, version

    async def rest(self, policy_version: int) -> None:
        """Give GPU memory back until weights come that are newer than `policy_version`."""
        await self._worker.engine.rest(policy_version)

    async def abandon(self) -> None:
        """Give up all rollouts, and be ready for weights of any policy version; during an update this is refused."""
        self.refuse_half_updated()
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for rollout in self._rollouts.values():
            await rollout.aclose()
        self._rollouts.clear()
        self._worker.forget_version()

    async def shutdown(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        if hasattr(self, "_worker"):
            await self._worker.shutdown()


def _services(settings: RolloutActorSettings, tokenizer: "PreTrainedTokenizerBase") -> Services:
    """Return what environments may use; the tokenizer is of the model that samples."""
    environment = settings.environment
    return Services(
        lru_cache(REMEMBERED_TEXTS)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))),
        lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        VerifierProcess(environment.weights, environment.reward_seconds, environment.tools),
        settings=environment,
        chat=None if settings.chat is None else _chat(*settings.chat),
        read_calls=reader_of(environment.tool_format, tokenizer),
        harness=_harness(environment),
    )


def _harness(environment: EnvironmentConfig) -> "HarnessRuntime | None":
    """Return what agents ask the student by, if they are the run's environment; it listens at the node's address."""
    if environment.kind not in HARNESS_KINDS:
        return None
    import ray

    from rollout_workers.harness.environment import HarnessRuntime

    return HarnessRuntime(environment, ray.util.get_node_ip_address())


def _chat(student: StudentConfig, prompts: PromptsConfig, now: datetime) -> Chat:
    """Load the student's tokenizer, which rendered the prompts; a teacher that is measured may have another."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student.model, trust_remote_code=student.trust_remote_code)
    return Chat(tokenizer, prompts, now)
