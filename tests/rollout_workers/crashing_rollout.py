"""A rollout actor without an engine that dies when it is told to; a module of its own, so that Ray can import it."""

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray

from cluster.actors.object_store import pack
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import RolloutError
from cluster.contracts.pieces import Pieces
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from cluster.contracts.trajectory import make_generated
from rollout_workers.pool import RolloutActorSettings
from tests.builders import make_trajectory

SECONDS_PER_TOKEN = 0.02
START_AGAIN_SECONDS = 2.0


class CrashingRollout:
    """Writes `seed` tokens for each request, one batch per request, and labels them with the weights it was brought.

    While a file of its own name lies in the folder that stands for the model, it takes the file away and dies
    over the next batch; while one called `stillborn` lies there, it dies when it starts again. It prints what the file
    holds before.
    """

    def __init__(self, settings: RolloutActorSettings) -> None:
        self._folder = Path(settings.student.model)
        self._name = ray.get_runtime_context().get_actor_name() or ""
        self._left: dict[int, list[RolloutRequest]] = {}
        self._has_prompts = False
        self._version = 0

    async def start(self) -> None:
        """Take a while when it is not the first time."""
        if (self._folder / "stillborn").exists():
            _die((self._folder / "stillborn").read_text())
        if "again" in self._name:
            await asyncio.sleep(START_AGAIN_SECONDS)

    async def pid(self) -> int:
        """Return what to send signals to."""
        return os.getpid()

    async def set_prompts(self, wire: pa.Buffer) -> None:
        """Remember that there are some."""
        self._has_prompts = True

    async def bring(self, version: int) -> None:
        """Stand for a weight update."""
        self._version = version

    async def start_rollout(
        self, call: int, requests: Sequence[RolloutRequest], sampling: SamplingSettings, priority: int
    ) -> tuple[Pieces, BatchHandle]:
        """Take the requests and answer the first."""
        if not self._has_prompts:
            raise RolloutError("no prompts")
        self._left[call] = list(requests)
        return await self.next_batch(call)

    async def next_batch(self, call: int) -> tuple[Pieces, BatchHandle]:
        """Answer the next request, or die over it."""
        request = self._left[call].pop(0)
        await asyncio.sleep(request.seed * SECONDS_PER_TOKEN)
        order = self._folder / self._name
        if order.exists():
            last_words = order.read_text()
            order.unlink()
            _die(last_words)
        version = self._version
        row = make_trajectory(
            completion=np.full(request.seed, 3),
            trajectory_id=request.trajectory_id,
            prompt_id=request.prompt_id,
            domain=self._name,
            min_policy_version=version,
            max_policy_version=version,
        )
        wire, handle = pack(make_generated([row]), {})
        return wire, replace(handle, is_last=not self._left[call])

    async def abandon(self) -> None:
        """Forget everything."""
        self._left.clear()

    async def shutdown(self) -> None:
        """End nothing."""


def _die(last_words: str) -> None:
    sys.stderr.write(last_words)
    sys.stderr.flush()
    os._exit(1)
