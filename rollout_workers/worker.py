"""Turns requests into Arrow batches of trajectories, as they finish."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import pyarrow as pa

from cluster.contracts.errors import PreceptorError, RolloutError, WeightSyncError
from cluster.contracts.metrics import Metrics, merge
from cluster.contracts.protocols import Generator, RolloutEngine
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from cluster.contracts.trajectory import GeneratedTrajectory, Ints, make_generated
from rollout_workers.batching import BatchSize, in_batches
from rollout_workers.contexts.builder import ContextBuilder
from rollout_workers.contexts.groups import Attempt, GroupBarrier, Released
from rollout_workers.environments.base import NewEnvironment, Outcome, Services, SingleTurn
from rollout_workers.episode import NO_LIMITS, Episode, Limits
from rollout_workers.privileged import PrivilegedSampler, Sample, own_rows
from rollout_workers.prompts import PromptSet
from rollout_workers.trajectory_builder import rollout_metrics

MOST_FAILURES = 16  # of environments one after the other: the environment itself is wrong

_log = logging.getLogger("preceptor")

NewContexts = Callable[[PromptSet], ContextBuilder | None]  # None: all models read the student's prompt
# Makes the privileged sampler, if there is one, of the prompts and of what samples one text.
NewPrivileged = Callable[[PromptSet, RolloutEngine, Sample], PrivilegedSampler | None]
RolloutBatch = tuple[pa.RecordBatch, Metrics, bool]  # finished trajectories, and whether none follow


class RolloutWorker:
    """Samples completions from an engine, lets environments answer them, and makes rows of finished trajectories."""

    def __init__(
        self,
        engine: RolloutEngine,
        services: Services,
        rows_per_batch: int,
        environment: NewEnvironment = SingleTurn,
        limits: Limits = NO_LIMITS,
        contexts: NewContexts = lambda prompts: None,
        privileged: NewPrivileged = lambda prompts, engine, sample: None,
    ) -> None:
        """Take the engine, what makes each episode's environment, and the bounds of an episode.

        `contexts` makes what builds the prompts of teachers that read another than the student's, `privileged` what
        answers requests to the privileged sampler.
        """
        self.engine = engine
        self._services = services
        self._batch_size = BatchSize(rows_per_batch)
        self._environment = environment
        self._limits = limits
        self._prompts: PromptSet | None = None
        self._new_contexts = contexts
        self._contexts: ContextBuilder | None = None
        self._new_privileged = privileged
        self._privileged: PrivilegedSampler | None = None
        self._policy_version: int | None = None  # None: the weights that the engine loaded from disk
        self._num_requests = self._num_failures = 0

    def set_prompts(self, prompts: PromptSet) -> None:
        self._prompts, self._contexts = prompts, self._new_contexts(prompts)
        self._privileged = self._new_privileged(prompts, self.engine, self._rollout)

    async def generate(
        self, requests: Sequence[RolloutRequest], sampling: SamplingSettings, priority: int = 0
    ) -> AsyncGenerator[RolloutBatch]:
        """Yield trajectories as they are done, `rows_per_batch` for the same teacher at a time, or more (BatchSize).

        The engine gets all requests at once, in this order, and decides how many run together; those of a call with a
        lower `priority` run first. `sampling.max_completion_tokens` bounds the sampled tokens of a whole trajectory.

        Raises:
            RolloutError: the prompts were never set, the engine gave up a request, or environments fail all the time.
        """
        last = perf_counter()
        tasks = [asyncio.create_task(self._answer(request, sampling, priority)) for request in requests]
        try:
            async for released, is_last in in_batches(tasks, self._batch_size, self._barrier(requests, sampling)):
                now = perf_counter()
                rows = [row for attempt, _ in released for row in (*attempt.earlier, attempt.trajectory)]
                has_turns = self._environment is not SingleTurn
                stops = bool(sampling.stop_repetition)
                metrics: Metrics = rollout_metrics(own_rows(rows), now - last, stops, has_turns)
                metrics = merge([metrics, *(attempt.metrics for attempt, _ in released)])
                if self._contexts is not None:
                    rows, of_contexts = self._with_contexts(self._contexts, released, sampling)
                    metrics = {**metrics, **of_contexts}
                yield make_generated(rows), {**metrics, **self._services.verifier.metrics()}, is_last
                last = now
        finally:
            for unfinished in tasks:
                unfinished.cancel()

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        await self.engine.init_weight_transfer(init_info)

    async def start_weight_update(self) -> None:
        await self.engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        await self.engine.update_weights(update_info)

    async def finish_weight_update(self, policy_version: int) -> str:
        """Install the received weights as `policy_version`, which must rise, resume, and return their checksum."""
        if self._policy_version is not None and policy_version <= self._policy_version:
            raise WeightSyncError(
                f"weights of policy version {policy_version} arrived after version {self._policy_version}; "
                "an update may only go forward"
            )
        self._policy_version = policy_version
        return await self.engine.finish_weight_update(policy_version)

    @property
    def policy_version(self) -> int:
        """Return the version of the engine's weights; 0: those that it loaded from disk."""
        return self._policy_version or 0

    def forget_version(self) -> None:
        """Let the next update bring any policy version, an earlier one too."""
        self._policy_version = None

    async def shutdown(self) -> None:
        self._services.verifier.close()
        if self._services.harness is not None:
            await self._services.harness.shutdown()
        await self.engine.shutdown()

    def _barrier(self, requests: Sequence[RolloutRequest], sampling: SamplingSettings) -> GroupBarrier:
        contexts = self._contexts if sampling.contexts == "all" else None
        if contexts is None:
            return GroupBarrier(requests, wait_seconds=0, waits=lambda route: False)
        return GroupBarrier(requests, contexts.wait_seconds, contexts.waits)

    def _with_contexts(
        self, contexts: ContextBuilder, released: Sequence[Released], sampling: SamplingSettings
    ) -> tuple[list[GeneratedTrajectory], Metrics]:
        built = [
            contexts.add(replace(attempt, trajectory=row), group, sampling.contexts)
            for attempt, group in released
            for row in (*attempt.earlier, attempt.trajectory)
        ]
        return [row for row, _ in built], merge([metrics for _, metrics in built])

    async def _answer(self, request: RolloutRequest, sampling: SamplingSettings, priority: int) -> Attempt:
        if not request.is_privileged:
            return await self._rollout(request, sampling, priority)
        if self._privileged is None:
            raise RolloutError(f"trajectory {request.trajectory_id} is for a privileged sampler, and there is none")
        return await self._privileged.answer(request, sampling, priority)

    async def _rollout(
        self,
        request: RolloutRequest,
        sampling: SamplingSettings,
        priority: int,
        read_as: Ints | None = None,
        engine: Generator | None = None,
    ) -> Attempt:
        """Run one episode; its environment may fail, but not those of many episodes one after the other.

        The model of the engine, or else of the worker's own, reads `read_as`, if given, in the place of the prompt,
        which the rows have all the same.
        """
        if self._prompts is None:
            raise RolloutError("a rollout was requested before the prompts were set")
        prompt = self._prompts.prompt(request.prompt_id)
        names = self._request_ids(request)
        episode = Episode(engine or self.engine, request, prompt, sampling, self._limits, priority, names, read_as)
        try:
            environment = self._environment(replace(self._services, stop=sampling.stop))
            reason, answer = await episode.run(environment)
        except PreceptorError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever the user's code raises
            return self._failed(episode, request, error)
        self._num_failures = 0
        *earlier, row = episode.rows(reason, answer.reward)
        if self._contexts is None:
            return Attempt(row, earlier=tuple(earlier))
        feedback = answer.feedback if isinstance(answer, Outcome) else ""
        return Attempt(row, self._services.text_of(episode.last), feedback, tuple(earlier))

    def _request_ids(self, request: RolloutRequest) -> Iterator[str]:
        """Yield what no request in use has: an episode has several turns, and comes again after a failure."""
        while True:
            self._num_requests += 1
            yield f"{request.trajectory_id}-{self._num_requests}"

    def _failed(self, episode: Episode, request: RolloutRequest, error: Exception) -> Attempt:
        self._num_failures += 1
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if self._num_failures >= MOST_FAILURES:
            raise RolloutError(
                f"trajectory {request.trajectory_id}: the environment failed: {what}; it is the {MOST_FAILURES}th time "
                "without a success between"
            ) from error
        _log.warning("trajectory %d: the environment failed: %s; it teaches nothing", request.trajectory_id, what)
        *earlier, row = episode.failed_rows(self.policy_version)
        return Attempt(row, earlier=tuple(earlier))
