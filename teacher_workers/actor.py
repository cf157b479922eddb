"""What runs in each Ray actor of teacher pools: TeacherWorkers behind calls that pass bytes and handles."""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa

from cluster.contracts.interfaces import BatchHandle, ScoreRequest
from cluster.contracts.metrics import Mean, Metrics, Sum
from cluster.contracts.pools import TeacherConfig
from cluster.contracts.wire import from_wire
from cluster.vllm_runtime import prepare_environment
from cluster.workers.batch_store import pack
from cluster.workers.engine_death import end_with_engine
from teacher_workers.time_share import TimeShare

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


class SlotActor:
    """Runs one TeacherWorker per teacher of a slot in an actor; one is awake at a time, and each has its turns."""

    def __init__(self, name: str, teachers: Mapping[str, TeacherConfig], max_model_len: int) -> None:
        self._name = name
        self._teachers = teachers
        self._max_model_len = max_model_len
        self._workers: dict[str, TeacherWorker] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Build all engines, one after the other; the last one stays awake."""
        sleeping_seconds, awake = 0.0, ""
        for teacher, config in self._teachers.items():
            if awake:
                began = time.monotonic()
                await self._workers[awake].sleep()
                sleeping_seconds = max(sleeping_seconds, time.monotonic() - began)
            name = f"{self._name}, teacher {teacher}"
            self._workers[teacher] = await start_worker(name, config, self._max_model_len, sleeps=True)
            awake = teacher
        # Waking is taken to cost what sleeping does, until it has been seen.
        self._share = TimeShare(self._workers, awake, switch_seconds=2 * sleeping_seconds)
        conducting = asyncio.create_task(self._share.conduct())
        conducting.add_done_callback(_tell_why)
        watching = asyncio.create_task(
            end_with_engine(lambda: conducting.done() or any(worker.is_dead for worker in self._workers.values()))
        )
        self._tasks = [watching, conducting]

    async def score(self, wire: pa.Buffer, request: ScoreRequest, teacher: str) -> tuple[pa.Buffer, BatchHandle]:
        """Score one batch when it is the teacher's turn."""
        async with self._share.turn(teacher):
            scored, metrics = await self._workers[teacher].score(from_wire(wire), request)
        woken = self._share.take_woken(teacher)
        switches = {"slot/switches": Sum(float(woken.num_switches)), "slot/switch_seconds": Sum(woken.seconds)}
        return _answer(wire, scored, {**metrics, **switches}, request)

    async def shutdown(self) -> None:
        """End the engines' processes."""
        for task in self._tasks:
            task.cancel()
        for worker in self._workers.values():
            await worker.shutdown()


async def start_worker(name: str, teacher: TeacherConfig, max_model_len: int, sleeps: bool = False) -> "TeacherWorker":
    """Start an engine and the worker that scores with it.

    Raises:
        ModelError: vLLM cannot serve the teacher, or its LM head cannot be read.
    """
    prepare_environment(teacher.engine)
    import torch

    from cluster.models.lm_head import load_lm_head
    from teacher_workers.vllm_engine import VllmScoringEngine
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
