"""What runs in each Ray actor of teacher pools: TeacherWorkers behind calls that pass bytes and handles."""

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa

from cluster.actors.liveness import end_with_engine
from cluster.actors.object_store import pack
from cluster.config.stages import TeacherConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.metrics import Mean, Metrics
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.wire import from_wire
from cluster.vllm.engine import prepare_environment

if TYPE_CHECKING:
    from teacher_workers.worker import TeacherWorker


_log = logging.getLogger("preceptor")


class TeacherActor:
    """Runs one TeacherWorker in an actor and keeps trajectory bytes in the object store."""

    def __init__(self, name: str, teacher: TeacherConfig, max_model_len: int) -> None:
        self._name = name
        self._teacher = teacher
        self._max_model_len = max_model_len
        self._watching: asyncio.Task[None] | None = None  # None: there is no engine yet

    async def start(self) -> None:
        """Build engine and worker; here and not in the constructor, because the engine belongs to the event loop."""
        self._worker = await start_worker(self._name, self._teacher, self._max_model_len)
        self._watching = asyncio.create_task(end_with_engine(lambda: self._worker.is_dead))

    async def score(self, wire: pa.Buffer, request: ScoreRequest) -> tuple[pa.Buffer, BatchHandle]:
        """Score one batch; Ray has fetched its bytes to this node before the call."""
        scored, metrics = await self._worker.score(from_wire(wire), request)
        return _answer(wire, scored, metrics, request)

    async def shutdown(self) -> None:
        """End the engine's processes."""
        if self._watching is not None:
            self._watching.cancel()
        if hasattr(self, "_worker"):
            await self._worker.shutdown()


async def start_worker(name: str, teacher: TeacherConfig, max_model_len: int, sleeps: bool = False) -> "TeacherWorker":
    """Start an engine and the worker that scores with it.

    Raises:
        ModelError: vLLM cannot serve the teacher, or its LM head cannot be read.
    """
    prepare_environment(teacher.engine)
    import torch

    from cluster.models.lm_head import load_lm_head
    from teacher_workers.backends.vllm import VllmScoringEngine
    from teacher_workers.worker import TeacherWorker

    head = load_lm_head(teacher.model, teacher.trust_remote_code, teacher.engine.dtype)
    engine = VllmScoringEngine(teacher, max_model_len, sleeps)
    # After the engine has taken its share of the GPU's memory: head and logits live in what gpu_memory_fraction
    # leaves free.
    return TeacherWorker(name, engine, head.to("cuda" if torch.cuda.is_available() else "cpu"))


def _tell_why(task: asyncio.Task[None]) -> None:
    """Log what ended a task that goes on for ever; the actor ends with it."""
    if not task.cancelled():
        _log.error("an engine did not go to sleep or wake: %s", task.exception())


def _answer(
    wire: pa.Buffer, batch: pa.RecordBatch, metrics: Metrics, request: ScoreRequest
) -> tuple[pa.Buffer, BatchHandle]:
    scored, handle = pack(batch, metrics)
    added = Mean(float(scored.size - wire.size), float(sum(handle.num_completion_tokens)))
    return scored, replace(handle, metrics={**handle.metrics, f"{request.model}/bytes_per_token": added})
