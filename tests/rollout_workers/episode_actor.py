"""A rollout actor that runs random episodes on a stub engine, and dies in the middle of some when it is to."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import ray

from cluster.contracts.requests import Completion, SamplingSettings
from rollout_workers.actor import RolloutActor
from rollout_workers.episode import Limits
from rollout_workers.worker import RolloutWorker
from tests.rollout_workers.test_episodes import SERVICES, RandomAnswers, StubModel

SECONDS = 0.002  # of a completion


class DyingModel(StubModel):
    """A stub engine whose process ends in a second or later turn of an episode while a file of its name is there."""

    def __init__(self, order: Path) -> None:
        super().__init__()
        self._order = order

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        await asyncio.sleep(SECONDS)
        if len(self.sampled) > 20 and request_id.partition("-")[0] in self.sampled and self._order.exists():
            self._order.unlink()
            os._exit(1)
        return await super().generate(request_id, prompt_ids, sampling, seed, priority)


class EpisodeActor(RolloutActor):
    """Runs the product's worker, whose engine is a stub."""

    async def start(self) -> None:
        order = Path(self._settings.student.model) / (ray.get_runtime_context().get_actor_name() or "")
        engine = DyingModel(order)
        self._worker = RolloutWorker(engine, SERVICES, 4, RandomAnswers, Limits(200))  # type: ignore[arg-type]
