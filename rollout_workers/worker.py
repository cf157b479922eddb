"""Turns requests into Arrow batches of trajectories, as they finish."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.contracts.errors import PreceptorError, RolloutError, WeightSyncError
from cluster.contracts.metrics import Metrics, merge
from cluster.contracts.protocols import RolloutEngine
from cluster.contracts.requests import Completion, RolloutRequest, SamplingSettings
from cluster.contracts.trajectory import FinishReason, GeneratedTrajectory, Ints, make_generated
from rollout_workers.batching import BatchSize, in_batches
from rollout_workers.contexts.builder import ContextBuilder
from rollout_workers.contexts.groups import Attempt, GroupBarrier, Released
from rollout_workers.environments.base import NewEnvironment, Observation, Outcome, Services, SingleTurn, TokenIds
from rollout_workers.privileged import PrivilegedSampler, Sample, own_rows
from rollout_workers.prompts import PromptSet, turn_seed
from rollout_workers.trajectory_builder import build_trajectory, rollout_metrics, token_ids_of

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
        max_observation_tokens: int = 0,
        contexts: NewContexts = lambda prompts: None,
        privileged: NewPrivileged = lambda prompts, engine, sample: None,
    ) -> None:
        """Take the engine, what makes each trajectory's environment, and how many tokens that may add to one prompt.

        `contexts` makes what builds the prompts of teachers that read another than the student's, `privileged` what
        answers requests to the privileged sampler.
        """
        self.engine = engine
        self._services = services
        self._batch_size = BatchSize(rows_per_batch)
        self._environment = environment
        self._max_observation_tokens = max_observation_tokens
        self._prompts: PromptSet | None = None
        self._new_contexts = contexts
        self._contexts: ContextBuilder | None = None
        self._new_privileged = privileged
        self._privileged: PrivilegedSampler | None = None
        self._policy_version: int | None = None  # None: the weights that the engine loaded from disk
        self._num_requests = 0

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
            RolloutError: the prompts were never set, the engine gave up a request, or an environment failed.
        """
        last = perf_counter()
        tasks = [asyncio.create_task(self._answer(request, sampling, priority)) for request in requests]
        try:
            async for released, is_last in in_batches(tasks, self._batch_size, self._barrier(requests, sampling)):
                now = perf_counter()
                rows = [attempt.trajectory for attempt, _ in released]
                metrics: Metrics = rollout_metrics(own_rows(rows), now - last, bool(sampling.stop_repetition))
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

    def forget_version(self) -> None:
        """Let the next update bring any policy version, an earlier one too."""
        self._policy_version = None

    async def shutdown(self) -> None:
        self._services.verifier.close()
        await self.engine.shutdown()

    def _barrier(self, requests: Sequence[RolloutRequest], sampling: SamplingSettings) -> GroupBarrier:
        contexts = self._contexts if sampling.contexts == "all" else None
        if contexts is None:
            return GroupBarrier(requests, wait_seconds=0, waits=lambda route: False)
        return GroupBarrier(requests, contexts.wait_seconds, contexts.waits)

    def _with_contexts(
        self, contexts: ContextBuilder, released: Sequence[Released], sampling: SamplingSettings
    ) -> tuple[list[GeneratedTrajectory], Metrics]:
        built = [contexts.add(attempt, group, sampling.contexts) for attempt, group in released]
        return [row for row, _ in built], merge([metrics for _, metrics in built])

    async def _answer(self, request: RolloutRequest, sampling: SamplingSettings, priority: int) -> Attempt:
        if not request.is_privileged:
            return await self._rollout(request, sampling, priority)
        if self._privileged is None:
            raise RolloutError(f"trajectory {request.trajectory_id} is for a privileged sampler, and there is none")
        return await self._privileged.answer(request, sampling, priority)

    async def _rollout(
        self, request: RolloutRequest, sampling: SamplingSettings, priority: int, read_as: Ints | None = None
    ) -> Attempt:
        """Sample and step until the environment has an outcome, or a limit ends the trajectory.

        The student reads `read_as`, if given, in the place of its prompt, which the trajectory has all the same.

        The finish reason is the last completion's. At a limit it is "length": all tokens that the trajectory may sample
        are sampled, or an observation does not fit. A completion that vLLM aborted is the last one, too.
        """
        if self._prompts is None:
            raise RolloutError("a rollout was requested before the prompts were set")
        prompt = self._prompts.prompt(request.prompt_id)
        with _failures_of_environment(request):
            environment = self._environment(replace(self._services, stop=sampling.stop))
            opening = _as_ids(await environment.start(prompt, request.seed))
        segments: list[Ints | Completion] = [opening]
        read = opening if read_as is None else np.concatenate([read_as, opening[len(prompt.token_ids) :]])
        tokens_left = sampling.max_completion_tokens
        capacity = self._max_observation_tokens + len(prompt.token_ids) - len(opening)  # for observations
        if capacity < 0:
            raise self._too_long(request, len(opening) - len(prompt.token_ids))
        while True:
            self._num_requests += 1
            completion = await self.engine.generate(
                # Not in use twice at once: a trajectory has several turns, and is requested again after a failure.
                f"{request.trajectory_id}-{self._num_requests}",
                np.concatenate([read, *(token_ids_of(segment) for segment in segments[1:])]).tolist(),
                replace(sampling, max_completion_tokens=tokens_left),
                turn_seed(request.seed, turn=len(segments) // 2),
                priority,
            )
            segments.append(completion)
            tokens_left -= len(completion.token_ids)
            with _failures_of_environment(request):
                answer = await environment.step(completion)
                if isinstance(answer, Outcome):
                    return self._attempt(request, segments, completion.finish_reason, answer)
                observed = _as_ids(answer.token_ids)
            capacity -= len(observed)
            if capacity < 0 and not self._max_observation_tokens:
                raise self._too_long(request, len(observed))
            if completion.finish_reason == "abort" or tokens_left <= 0 or capacity < 0:
                reason: FinishReason = "abort" if completion.finish_reason == "abort" else "length"
                return self._attempt(request, segments, reason, answer)
            segments.append(observed)

    def _attempt(
        self,
        request: RolloutRequest,
        segments: Sequence[Ints | Completion],
        finish_reason: FinishReason,
        answer: Observation | Outcome,
    ) -> Attempt:
        assert self._prompts is not None
        prompt = self._prompts.prompt(request.prompt_id)
        row = build_trajectory(request, prompt, segments, finish_reason, answer.reward)
        if self._contexts is None:
            return Attempt(row)
        *_, last = (segment for segment in segments if isinstance(segment, Completion))
        feedback = answer.feedback if isinstance(answer, Outcome) else ""
        return Attempt(row, self._services.text_of(last), feedback)

    def _too_long(self, request: RolloutRequest, num_tokens: int) -> RolloutError:
        return RolloutError(
            f"trajectory {request.trajectory_id}: the environment adds {num_tokens} tokens to the prompt, but "
            f"environment.max_observation_tokens = {self._max_observation_tokens}; raise it"
        )


def _as_ids(token_ids: TokenIds) -> Ints:
    return np.asarray(token_ids, np.int32).reshape(-1)


@contextmanager
def _failures_of_environment(request: RolloutRequest) -> Iterator[None]:
    """Raise RolloutError, which names the trajectory, for whatever the user's code raises."""
    try:
        yield
    except PreceptorError:
        raise
    except Exception as error:
        raise RolloutError(
            f"trajectory {request.trajectory_id}: the environment failed: {type(error).__name__}: {error}"
        ) from error
