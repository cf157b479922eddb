"""A teacher actor without an engine that dies when it is told to; a module of its own, so that Ray can import it."""

import asyncio
import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.actors.object_store import pack
from cluster.config.stages import TeacherConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.pieces import Pieces
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import add_scores, ragged
from cluster.contracts.wire import from_wire

DEATH_SECONDS = 0.2  # how long a replica that is going to die keeps its batches


class CrashingTeacher:
    """Gives every token its replica's number as the score.

    While a file of its own name lies in the folder that stands for the model, it takes the file away and dies soon
    after it was given a batch; while one called `stillborn` lies there, it dies when it starts again.
    """

    def __init__(self, name: str, teacher: TeacherConfig, max_model_len: int) -> None:
        self._folder = Path(teacher.model)
        self._order = self._folder / name
        self._number = int(name.rpartition("-")[2])

    async def start(self) -> None:
        """Start nothing."""
        if (self._folder / "stillborn").exists():
            os._exit(1)

    async def score(self, wire: pa.Buffer, request: ScoreRequest) -> tuple[Pieces, BatchHandle]:
        """Score, or wait for death."""
        if self._order.exists():
            await asyncio.sleep(DEATH_SECONDS)
            self._order.unlink(missing_ok=True)
            os._exit(1)
        batch = from_wire(wire)
        logprobs = np.full(len(ragged(batch, "rollout_logprobs").values), -float(self._number), np.float32)
        return pack(add_scores(batch, request.model, {"logprobs": logprobs}), {})

    async def shutdown(self) -> None:
        """End nothing."""
