"""One rollout worker: requests in, Arrow batches of trajectories out, as they finish."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import pyarrow as pa

from cluster.contracts.errors import RolloutError, WeightSyncError
from cluster.contracts.metrics import Metrics
from cluster.contracts.protocols import RolloutEngine
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from cluster.contracts.trajectory import GeneratedTrajectory, Ints, make_generated
from rollout_workers.batching import in_batches
from rollout_workers.environments.verifiers import VerifierProcess
from rollout_workers.prompts import PromptSet
from rollout_workers.trajectory_builder import PromptFacts, before_stop, build_trajectory, rollout_metrics

Decode = Callable[[Ints], str]  # completion tokens to text, without special tokens


@dataclass(frozen=True)
class WrittenBatch:
    """Some finished trajectories of a rollout."""

    rows: pa.RecordBatch
    metrics: Metrics
    is_last: bool  # whether none follow


class RolloutWorker:
    """Draws completions from an engine and makes rows of them, rewards included."""

    def __init__(self, engine: RolloutEngine, decode: Decode, rows_per_batch: int) -> None:
        self._engine = engine
        self._decode = decode
        self._rows_per_batch = rows_per_batch
        self._judge = VerifierProcess()
        self._prompts: PromptSet | None = None
        self._policy_version: int | None = None  # None: the weights that the engine loaded from disk
        self._num_requests = 0

    def set_prompts(self, prompts: PromptSet) -> None:
        """Replace the prompts that requests name by id."""
        self._prompts = prompts

    async def generate(
        self, requests: Sequence[RolloutRequest], sampling: SamplingSettings, verifier: str, priority: int = 0
    ) -> AsyncGenerator[WrittenBatch]:
        """Yield trajectories as they are done, up to `rows_per_batch` for the same teacher at a time.

        Args:
            requests: all are handed to the engine at once, in this order; it decides how many run together.
            sampling: how to draw.
            verifier: which verifier gives the reward of a completion whose prompt has an answer.
            priority: requests of a call with a lower one run first.

        Raises:
            RolloutError: the prompts were never set, or the engine gave up a request.
        """
        last = perf_counter()
        tasks = [asyncio.create_task(self._rollout(request, sampling, verifier, priority)) for request in requests]
        try:
            async for rows, is_last in in_batches(tasks, self._rows_per_batch):
                now = perf_counter()
                metrics = rollout_metrics(rows, now - last, bool(sampling.stop_repetition))
                yield WrittenBatch(make_generated(rows), metrics, is_last)
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
        """End the engine and the judge."""
        self._judge.close()
        await self._engine.shutdown()

    async def _rollout(
        self, request: RolloutRequest, sampling: SamplingSettings, verifier: str, priority: int
    ) -> GeneratedTrajectory:
        prompt = self._prompt(request.prompt_id)
        self._num_requests += 1
        # A request id must not be in use twice at once; a trajectory may be asked for again after a failure.
        request_id = f"{request.trajectory_id}-{self._num_requests}"
        completion = await self._engine.generate(
            request_id, prompt.token_ids.tolist(), sampling, request.seed, priority
        )
        reward: float | None = None
        if prompt.answer is not None:
            text = before_stop(self._decode(completion.token_ids), sampling.stop)
            reward = await self._judge.reward(verifier, text, prompt.answer, completion.finish_reason)
        return build_trajectory(request, prompt, completion, reward)

    def _prompt(self, prompt_id: int) -> PromptFacts:
        prompts = self._prompts
        if prompts is None:
            raise RolloutError("a rollout was asked for before the prompts were set")
        return PromptFacts(
            token_ids=prompts.token_ids(prompt_id),
            teacher=prompts.teacher(prompt_id),
            domain=prompts.domain(prompt_id),
            answer=prompts.answer(prompt_id),
        )
