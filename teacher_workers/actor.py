"""What runs in each Ray actor of a teacher pool: one TeacherWorker behind calls that pass bytes and handles."""

import asyncio
from dataclasses import replace

import pyarrow as pa

from cluster.batch_store import pack
from cluster.contracts.config import TeacherConfig
from cluster.contracts.interfaces import BatchHandle, ScoreRequest
from cluster.contracts.metrics import Mean
from cluster.contracts.wire import from_wire
from cluster.engine_death import end_with_engine
from cluster.vllm_runtime import prepare_environment


class TeacherActor:
    """Runs one TeacherWorker in an actor and keeps trajectory bytes in the object store."""

    def __init__(self, name: str, teacher: TeacherConfig, max_model_len: int) -> None:
        self._name = name
        self._teacher = teacher
        self._max_model_len = max_model_len
        self._watching: asyncio.Task[None] | None = None  # None: there is no engine yet

    async def start(self) -> None:
        """Build engine and worker; here and not in the constructor, because the engine belongs to the event loop."""
        teacher = self._teacher
        prepare_environment(teacher.engine)
        import torch

        from cluster.lm_head import load_lm_head
        from teacher_workers.vllm_engine import VllmScoringEngine
        from teacher_workers.worker import TeacherWorker

        head = load_lm_head(teacher.model, teacher.trust_remote_code, teacher.engine.dtype)
        engine = VllmScoringEngine(teacher, self._max_model_len)
        # After the engine has taken its share of the GPU's memory: head and logits live in what gpu_memory_fraction
        # leaves free.
        head = head.to("cuda" if torch.cuda.is_available() else "cpu")
        self._worker = TeacherWorker(self._name, engine, head)
        self._watching = asyncio.create_task(end_with_engine(lambda: engine.is_dead))

    async def score(self, wire: pa.Buffer, request: ScoreRequest) -> tuple[pa.Buffer, BatchHandle]:
        """Score one batch; Ray has fetched its bytes to this node before the call."""
        scored, handle = pack(*await self._worker.score(from_wire(wire), request))
        added = Mean(float(scored.size - wire.size), float(sum(handle.num_completion_tokens)))
        return scored, replace(handle, metrics={**handle.metrics, f"{request.model}/bytes_per_token": added})

    async def shutdown(self) -> None:
        """End the engine's processes."""
        if self._watching is not None:
            self._watching.cancel()
        if hasattr(self, "_worker"):
            await self._worker.shutdown()
