"""Rollout and teacher actors whose engines do nothing but wait, each time for a random time with a heavy tail.

The actors are the real ones; only what they start is a stub: `python -m benchmarks.soak` asks what delays do to the
machinery around models.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa

from cluster.config.stages import TeacherConfig
from cluster.contracts.columns import Floats, Ints
from cluster.contracts.metrics import Metric, Sum
from cluster.contracts.requests import Completion, SamplingSettings, ScoreRequest
from cluster.contracts.trajectory import add_scores, ragged
from cluster.weight_sync.manifest import new_digest
from rollout_workers.actor import RolloutActor
from rollout_workers.environments.base import Services
from rollout_workers.pool import RolloutActorSettings
from rollout_workers.worker import RolloutWorker
from teacher_workers.actor import TeacherActor

TAIL_EXPONENT = 1.5  # P(delay > x) falls as x^-1.5: the mean exists, the variance does not
LONGEST_COMPLETION_TOKENS = 400


@dataclass(frozen=True)
class Delays:
    """Waits of one mean, drawn from a Lomax distribution and cut; the same for the same key."""

    seed: int
    mean_seconds: float
    longest_seconds: float

    def seconds(self, stage: str, *key: int) -> float:
        """Return the wait of one event of a stage."""
        random = np.random.default_rng([self.seed, crc32(stage.encode()), *key])
        drawn = self.mean_seconds * (TAIL_EXPONENT - 1) * random.pareto(TAIL_EXPONENT)
        return float(min(drawn, self.longest_seconds))


class WaitingRolloutEngine:
    """A RolloutEngine that waits instead of writing, and pauses while its weights are replaced."""

    def __init__(self, delays: Delays, worker: int) -> None:
        self._delays, self._worker = delays, worker
        self._policy_version = 0
        self._num_verbs = 0  # weight verbs so far
        self._runs = asyncio.Event()
        self._runs.set()

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        """Return as many tokens as the seed says; the second half carries the version at the end of the wait."""
        await self._runs.wait()
        length = 1 + seed % LONGEST_COMPLETION_TOKENS
        policy_versions = np.full(length, self._policy_version, np.int32)
        await asyncio.sleep(self._delays.seconds("request", seed))
        await self._runs.wait()
        policy_versions[(length + 1) // 2 :] = self._policy_version
        return Completion(np.ones(length, np.int32), np.full(length, -1, np.float32), "stop", policy_versions)

    async def prompt_logprobs(
        self, request_id: str, token_ids: Ints, places: Ints, count: int, priority: int
    ) -> tuple[Ints, Floats]:
        """Say that every token is sure: a soak has no rows of a privileged sampler."""
        shape = len(places), 1 + count
        return np.zeros(shape, np.int32), np.zeros(shape, np.float32)

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Open nothing."""

    async def start_weight_update(self) -> None:
        """Pause generation."""
        await self._wait()
        self._runs.clear()
        self._digest = new_digest()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Read a bucket as far as its checksum goes."""
        await self._wait()
        self._digest.update(update_info["buffer"])

    async def finish_weight_update(self, policy_version: int) -> str:
        """Go on as `policy_version`, and return the checksum of what came."""
        await self._wait()
        self._policy_version = policy_version
        self._runs.set()
        return self._digest.hexdigest()

    async def rest(self, policy_version: int) -> None:
        """Have no memory to give back."""

    async def shutdown(self) -> None:
        """End nothing."""

    async def _wait(self) -> None:
        self._num_verbs += 1
        await asyncio.sleep(self._delays.seconds("weights", self._worker, self._num_verbs))


class WaitingRolloutActor(RolloutActor):
    """A RolloutActor on a waiting engine, which also waits before it answers with a batch."""

    def __init__(self, settings: RolloutActorSettings, delays: Delays, worker: int) -> None:
        super().__init__(settings)
        self._delays, self._index = delays, worker
        self._num_batches = 0

    async def start(self) -> None:
        """Build the worker."""
        engine = WaitingRolloutEngine(self._delays, self._index)
        self._worker = RolloutWorker(engine, Services(lambda text: [], lambda ids: ""), self._settings.rows_per_batch)

    async def next_batch(self, call: int) -> Any:
        """Return what the real actor would, later."""
        answer = await super().next_batch(call)
        self._num_batches += 1
        await asyncio.sleep(self._delays.seconds("batch", self._index, self._num_batches))
        return answer


class WaitingTeacher:
    """Scores every token alike, after a wait."""

    def __init__(self, delays: Delays, worker: int) -> None:
        self._delays, self._index = delays, worker
        self._num_batches = 0

    async def score(self, batch: pa.RecordBatch, request: ScoreRequest) -> tuple[pa.RecordBatch, dict[str, Metric]]:
        """Add the model's columns; several batches may wait at once."""
        self._num_batches += 1
        await asyncio.sleep(self._delays.seconds("score", self._index, self._num_batches))
        num_tokens = len(ragged(batch, "rollout_logprobs").values)
        scores = {"logprobs": np.full(num_tokens, -2, np.float32)}
        return add_scores(batch, request.model, scores), {f"{request.model}/scored_tokens": Sum(float(num_tokens))}

    async def shutdown(self) -> None:
        """End nothing."""


class WaitingTeacherActor(TeacherActor):
    """A TeacherActor with a waiting teacher."""

    def __init__(self, name: str, teacher: TeacherConfig, max_model_len: int, delays: Delays, worker: int) -> None:
        super().__init__(name, teacher, max_model_len)
        self._delays, self._index = delays, worker

    async def start(self) -> None:
        """Build the worker."""
        self._worker = WaitingTeacher(self._delays, self._index)  # type: ignore[assignment]
