"""Adds our calls to vLLM's worker class and registers our weight-transfer backends with vLLM."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from rollout_workers.candidates.draws import CandidateLog
from rollout_workers.candidates.vllm_processor import CandidateProcessor, CandidateProcessorV2
from rollout_workers.weight_sync.object_store import BACKEND, ObjectStoreReceiver


def register() -> None:
    """Make the backend known to vLLM, which calls this in each of its processes as a `vllm.general_plugins` plugin."""
    if BACKEND in WeightTransferEngineFactory._registry:  # vLLM may load plugins twice in one process
        return
    receivers = "rollout_workers.weight_sync."
    WeightTransferEngineFactory.register_engine(BACKEND, f"{receivers}object_store", "ObjectStoreReceiver")
    WeightTransferEngineFactory.register_engine("plain_ipc", f"{receivers}nccl_and_ipc", "IpcReceiver")
    WeightTransferEngineFactory.register_engine("renewed_nccl", f"{receivers}nccl_and_ipc", "NcclReceiver")


class WeightReport:
    """Adds two calls to vLLM's worker class, for `collective_rpc` to make by name."""

    weight_transfer_engine: WeightTransferEngine[Any, Any] | None
    start_weight_update: Callable[[], None]
    finish_weight_update: Callable[[], None]

    def begin_update(self) -> None:
        """Start an update through the object store."""
        assert isinstance(self.weight_transfer_engine, ObjectStoreReceiver)
        self.weight_transfer_engine.begin()
        self.start_weight_update()

    def finish_and_report(self) -> dict[str, Any]:
        """Finish the update and return its outcome as plain values, which vLLM can pass between processes."""
        engine = self.weight_transfer_engine
        assert isinstance(engine, ObjectStoreReceiver)
        self.finish_weight_update()
        engine.end()
        return asdict(engine.received)


class WorkerExtension(WeightReport):
    """Adds `take_candidates` and WeightReport's calls to vLLM's worker class, for `collective_rpc` to make by name."""

    model_runner: Any
    use_v2_model_runner: bool

    def take_candidates(self, wanted: Mapping[str, int], given_up: Sequence[str]) -> dict[str, tuple[bytes, bytes]]:
        """Return finished requests' ids and log-probabilities, as `candidates_from_bytes` reads them, and forget them.

        Bytes, because vLLM passes no arrays between processes unless it is told to unpickle what comes.

        Args:
            wanted: from key to the number of tokens that were kept.
            given_up: keys of requests whose draws nobody wants.
        """
        log = self._draw_log()
        log.drop(given_up)
        taken = {key: log.take(key, num_tokens) for key, num_tokens in wanted.items()}
        return {key: (draws[0].tobytes(), draws[1].tobytes()) for key, draws in taken.items() if draws}

    def _draw_log(self) -> CandidateLog:
        runner = self.model_runner
        processors = (
            runner.sampler.logits_processors if self.use_v2_model_runner else runner.input_batch.logitsprocs.all
        )
        [log] = [found.log for found in processors if isinstance(found, CandidateProcessor | CandidateProcessorV2)]
        return log
