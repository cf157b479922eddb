"""Teacher actors without engines whose models are numbers; a module of its own, so that Ray can import it."""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.actors.object_store import pack
from cluster.config.stages import TeacherConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import ModelError
from cluster.contracts.pieces import Pieces
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import add_scores, ragged
from cluster.contracts.wire import from_wire

DEATH_SECONDS = 0.2  # how long a replica that is going to die keeps its batches


class ConstantTeacher:
    """Gives every token the last part of its model's path as the score; serves one teacher, or those of a slot.

    While a file of its own name lies in the models' folder, it takes the file away and dies soon after it was given a
    batch. A model called `broken` cannot be served.
    """

    def __init__(self, name: str, teachers: TeacherConfig | Mapping[str, TeacherConfig], max_model_len: int) -> None:
        self._teachers = {"": teachers} if isinstance(teachers, TeacherConfig) else teachers
        self._order = Path(next(iter(self._teachers.values())).model).parent / name

    async def start(self) -> None:
        """Start nothing."""
        if any(Path(teacher.model).name == "broken" for teacher in self._teachers.values()):
            raise ModelError("vLLM cannot serve broken")

    async def score(self, wire: pa.Buffer, request: ScoreRequest, teacher: str = "") -> tuple[Pieces, BatchHandle]:
        """Score, or wait for death."""
        if self._order.exists():
            await asyncio.sleep(DEATH_SECONDS)
            self._order.unlink(missing_ok=True)
            os._exit(1)
        batch = from_wire(wire)
        score = float(Path(self._teachers[teacher].model).name)
        logprobs = np.full(len(ragged(batch, "rollout_logprobs").values), score, np.float32)
        return pack(add_scores(batch, request.model, {"logprobs": logprobs}), {})

    async def shutdown(self) -> None:
        """End nothing."""
