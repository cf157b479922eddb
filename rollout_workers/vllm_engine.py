"""The rollout engine on vLLM: seeded completions with log-probabilities, and weights replaced while requests run."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from cluster.contracts.config import EngineConfig, StudentConfig
from cluster.contracts.errors import RolloutError, WeightSyncError
from cluster.contracts.interfaces import Completion, SamplingSettings
from cluster.contracts.trajectory import FinishReason
from cluster.vllm_runtime import EngineRole, build_engine

OBJECT_STORE = "object_store"
UNVERIFIED = "unverified"  # vLLM's own backends report nothing of what they received
FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class VllmRolloutEngine:
    """A RolloutEngine that runs the student in vLLM; build it inside a running event loop."""

    def __init__(self, student: StudentConfig, engine: EngineConfig, max_model_len: int, backend: str | None) -> None:
        """Start the engine.

        Args:
            student: the model.
            engine: how it is served.
            max_model_len: tokens of the longest prompt and completion, plus 1.
            backend: how new weights arrive: "object_store", or vLLM's "nccl" or "ipc"; None: never.
        """
        self._backend = backend
        self._engine = build_engine(
            student.model,
            student.trust_remote_code,
            engine,
            EngineRole(
                max_model_len=max_model_len,
                logprobs_mode="processed_logprobs",
                max_logprobs=1,
                prefix_caching=True,
                tokenizer=True,
                weight_transfer_backend=backend,
                worker_extension="rollout_workers.weight_receiver.WeightReport" if backend == OBJECT_STORE else None,
            ),
        )

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int
    ) -> Completion:
        """Draw one completion; a stop string's own tokens stay, for the student sampled them."""
        prompt = {"prompt_token_ids": [int(token) for token in prompt_ids]}
        try:
            outputs = [out async for out in self._engine.generate(prompt, _sampling_params(sampling, seed), request_id)]
        except (EngineDeadError, EngineGenerateError, ValueError) as error:
            raise RolloutError(f"request {request_id}: vLLM gave it up: {error}") from error
        return _completion(request_id, outputs[-1].outputs[0])

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Open the receiving end of the configured backend."""
        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def start_weight_update(self) -> None:
        """Pause, keeping running requests, whose keys and values are computed anew under the new weights."""
        # Clearing the caches here, while nothing runs, covers both running requests and shared prefixes: vLLM puts the
        # former back in its queue. A reset after the update would fail as long as a request holds a block.
        await self._engine.pause_generation(mode="keep", clear_cache=True)
        await self._engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive one bucket; for the object store, `update_info["buffer"]` holds its bytes."""
        if self._backend != OBJECT_STORE:
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))
            return
        buffer = update_info["buffer"]
        with shared_memory(buffer) as path:
            described = {name: value for name, value in update_info.items() if name != "buffer"}
            bucket = described | {"path": path, "num_bytes": len(buffer)}
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info=bucket))

    async def finish_weight_update(self, policy_version: int) -> str:
        """Install the weights, resume, and return the checksum that every worker of this engine received.

        Raises:
            WeightSyncError: a parameter is missing, unknown or damaged, or the engine's workers disagree.
        """
        await self._engine.finish_weight_update()
        checksum = UNVERIFIED
        if self._backend == OBJECT_STORE:
            checksum = common_checksum(await self._engine.collective_rpc("weight_report"), policy_version)
        await self._engine.resume_generation()
        return checksum

    async def shutdown(self) -> None:
        """End the engine's process."""
        self._engine.shutdown()


def common_checksum(reports: Sequence[dict[str, Any]], policy_version: int) -> str:
    """Return the checksum that all tensor-parallel workers report.

    Raises:
        WeightSyncError: a worker reports a fault, or they received different bytes.
    """
    for rank, report in enumerate(reports):
        if report["fault"] is not None:
            raise WeightSyncError(f"weights of policy version {policy_version}, engine rank {rank}: {report['fault']}")
    checksums = {report["checksum"] for report in reports}
    if len(checksums) != 1:
        raise WeightSyncError(
            f"weights of policy version {policy_version}: the engine's ranks received different bytes, "
            f"with checksums {sorted(checksums)}"
        )
    return str(checksums.pop())


@contextmanager
def shared_memory(buffer: Any) -> Iterator[str]:
    """Copy the bytes into memory that other processes of this user can map, and yield the path to open it by.

    The memory has no name in a file system, so it is limited by RAM instead of by /dev/shm, and nothing is left behind
    when the process dies. It is freed when this context and the last mapping are gone.
    """
    descriptor = os.memfd_create("preceptor-weights")
    try:
        with open(descriptor, "wb", closefd=False) as shared:
            shared.write(buffer)
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _sampling_params(sampling: SamplingSettings, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_completion_tokens,
        seed=seed,
        stop=list(sampling.stop) or None,
        logprobs=0,  # the sampled token's only
        flat_logprobs=True,
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completion(request_id: str, output: CompletionOutput) -> Completion:
    logprobs = output.logprobs
    if output.finish_reason not in FINISH_REASONS:
        raise RolloutError(f"request {request_id}: vLLM ended it for the reason {output.finish_reason!r}")
    assert isinstance(logprobs, FlatLogprobs)
    return Completion(
        token_ids=np.asarray(output.token_ids, dtype=np.int32),
        logprobs=np.asarray(logprobs.logprobs, dtype=np.float32),  # one entry per position: logprobs=0
        finish_reason=FINISH_REASONS[output.finish_reason],
    )
