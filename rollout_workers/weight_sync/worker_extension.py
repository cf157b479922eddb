"""Registers our weight-transfer engines with vLLM, and adds our calls to vLLM's worker class."""

from collections.abc import Callable
from typing import Any

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from cluster.weight_sync.transports import TRANSPORTS, vllm_backend
from rollout_workers.candidates.vllm_processor import CandidateCalls


def register() -> None:
    """Make the receivers known to vLLM, which calls this plugin in each of its processes."""
    for name, transport in TRANSPORTS.items():
        if vllm_backend(name) not in WeightTransferEngineFactory._registry:  # vLLM may load plugins twice in a process
            module, _, receiver = transport.receiver.partition(":")
            WeightTransferEngineFactory.register_engine(vllm_backend(name), module, receiver)


class WeightReport:
    """Starts and finishes updates, with what the receivers of `TRANSPORTS` add to vLLM's own steps."""

    weight_transfer_engine: Any  # one of TRANSPORTS' receivers
    start_weight_update: Callable[[], None]
    finish_weight_update: Callable[[], None]

    def begin_update(self) -> None:
        self.weight_transfer_engine.begin()
        self.start_weight_update()

    def finish_and_report(self) -> dict[str, Any]:
        """Finish the update and return its outcome as plain values, which vLLM can pass between processes."""
        self.finish_weight_update()
        report: dict[str, Any] = self.weight_transfer_engine.end()
        return report


class WorkerExtension(WeightReport, CandidateCalls):
    """Composes all calls that vLLM's worker class gets, for `collective_rpc` to make by name."""
