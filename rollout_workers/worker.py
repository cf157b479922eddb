"""Turns requests into Arrow batches of trajectories, as they finish."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.contracts.errors import PreceptorError, RolloutError, WeightSyncError
from cluster.contracts.metrics import Metrics
from cluster.contracts.protocols import RolloutEngine
from cluster.contracts.requests import Completion, RolloutRequest, SamplingSettings
from cluster.contracts.trajectory import FinishReason, GeneratedTrajectory, Ints, make_generated
from rollout_workers.batching import in_batches
from rollout_workers.environments.base import NewEnvironment, Outcome, Prompt, Services, SingleTurn, TokenIds
from rollout_workers.prompts import PromptSet, turn_seed
from rollout_workers.trajectory_builder import build_trajectory, rollout_metrics, token_ids_of

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
    ) -> None:
        """Take the engine.

        Args:
            engine: samples completions.
            services: what environments may use.
            rows_per_batch: the most trajectories of a batch.
            environment: makes the environment of each trajectory.
            max_observation_tokens: how many tokens an environment may add to one prompt; the context is that long.
        """
        self._engine = engine
        self._services = services
        self._rows_per_batch = rows_per_batch
        self._environment = environment
        self._max_observation_tokens = max_observation_tokens
        self._prompts: PromptSet | None = None
        self._policy_version: int | None = None  # None: the weights that the engine loaded from disk
        self._num_requests = 0

    def set_prompts(self, prompts: PromptSet) -> None:
        """Replace the prompts that requests name by id."""
        self._prompts = prompts

    async def generate(
        self, requests: Sequence[RolloutRequest], sampling: SamplingSettings, priority: int = 0
    ) -> AsyncGenerator[RolloutBatch]:
        """Yield trajectories as they are done, up to `rows_per_batch` for the same teacher at a time.

        Args:
            requests: all are handed to the engine at once, in this order; it decides how many run together.
            sampling: how to sample; its `max_completion_tokens` bounds the sampled tokens of a whole trajectory.
            priority: requests of a call with a lower one run first.

        Raises:
            RolloutError: the prompts were never set, the engine gave up a request, or an environment failed.
        """
        last = perf_counter()
        tasks = [asyncio.create_task(self._rollout(request, sampling, priority)) for request in requests]
        try:
            async for rows, is_last in in_batches(tasks, self._rows_per_batch):
                now = perf_counter()
                metrics = rollout_metrics(rows, now - last, bool(sampling.stop_repetition))
                yield make_generated(rows), metrics, is_last
                last = now
        finally:
            for unfinished in tasks:
                unfinished.cancel()

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Open the receiving end of the weight sync."""
        await self._engine.init_weight_transfer(init_info)

    async def start_weight_update(self) -> None:
        """Pause generation and make the engine ready to receive."""
        await self._engine.start_weight_update()

    async def update_weights(self, update_info: Any) -> None:
        """Receive one bucket."""
        await self._engine.update_weights(update_info)

    async def finish_weight_update(self, policy_version: int) -> str:
        """Install the received weights as `policy_version`, go on generating, and return their checksum.

        Raises:
            WeightSyncError: the version does not lie above the present one, or the weights are incomplete or damaged.
        """
        if self._policy_version is not None and policy_version <= self._policy_version:
            raise WeightSyncError(
                f"weights of policy version {policy_version} arrived after version {self._policy_version}; "
                "an update may only go forward"
            )
        self._policy_version = policy_version
        return await self._engine.finish_weight_update(policy_version)

    def forget_version(self) -> None:
        """Let the next update bring any policy version, an earlier one too."""
        self._policy_version = None

    async def shutdown(self) -> None:
        """End the engine and the verifier."""
        self._services.verifier.close()
        await self._engine.shutdown()

    async def _rollout(self, request: RolloutRequest, sampling: SamplingSettings, priority: int) -> GeneratedTrajectory:
        """Sample and step until the environment has an outcome, or a limit ends the trajectory.

        The finish reason is the last completion's. At a limit it is "length": all tokens that the trajectory may sample
        are sampled, or an observation does not fit; a request that vLLM aborted ends it, too.
        """
        prompt = self._prompt(request.prompt_id)
        with _failures_of_environment(request):
            environment = self._environment(replace(self._services, stop=sampling.stop))
            opening = _as_ids(await environment.start(prompt, request.seed))
        room = len(prompt.token_ids) + self._max_observation_tokens - len(opening)
        if room < 0:
            raise self._no_room(request, len(opening) - len(prompt.token_ids))
        segments: list[Ints | Completion] = [opening]
        tokens_left = sampling.max_completion_tokens
        for turn in count():
            completion = await self._sample(
                request, segments, replace(sampling, max_completion_tokens=tokens_left), turn, priority
            )
            segments.append(completion)
            tokens_left -= len(completion.token_ids)
            with _failures_of_environment(request):
                answer = await environment.step(completion)
                if isinstance(answer, Outcome):
                    return build_trajectory(request, prompt, segments, completion.finish_reason, answer.reward)
                observed = _as_ids(answer.token_ids)
            room -= len(observed)
            if room < 0 and not self._max_observation_tokens:
                raise self._no_room(request, len(observed))
            if completion.finish_reason == "abort" or tokens_left <= 0 or room < 0:
                reason: FinishReason = "abort" if completion.finish_reason == "abort" else "length"
                return build_trajectory(request, prompt, segments, reason, answer.reward)
            segments.append(observed)
        raise AssertionError("a trajectory has no last turn")

    async def _sample(
        self,
        request: RolloutRequest,
        segments: Sequence[Ints | Completion],
        sampling: SamplingSettings,
        turn: int,
        priority: int,
    ) -> Completion:
        """Sample the completion that follows the segments."""
        self._num_requests += 1
        # A request id must not be in use twice at once, and a trajectory is requested again after a failure.
        request_id = f"{request.trajectory_id}-{self._num_requests}"
        token_ids = np.concatenate([token_ids_of(segment) for segment in segments]).tolist()
        return await self._engine.generate(request_id, token_ids, sampling, turn_seed(request.seed, turn), priority)

    def _prompt(self, prompt_id: int) -> Prompt:
        if self._prompts is None:
            raise RolloutError("a rollout was asked for before the prompts were set")
        return self._prompts.prompt(prompt_id)

    def _no_room(self, request: RolloutRequest, num_tokens: int) -> RolloutError:
        return RolloutError(
            f"trajectory {request.trajectory_id}: the environment adds {num_tokens} tokens to the prompt, but "
            f"environment.max_observation_tokens = {self._max_observation_tokens}; raise it"
        )


def _as_ids(token_ids: TokenIds) -> Ints:
    return np.asarray(token_ids, np.int32).reshape(-1)


@contextmanager
def _failures_of_environment(request: RolloutRequest) -> Iterator[None]:
    """Name the trajectory in which the user's code failed.

    Raises:
        RolloutError: the code raised anything that is not ours.
    """
    try:
        yield
    except PreceptorError:
        raise
    except Exception as error:
        raise RolloutError(
            f"trajectory {request.trajectory_id}: the environment failed: {type(error).__name__}: {error}"
        ) from error
