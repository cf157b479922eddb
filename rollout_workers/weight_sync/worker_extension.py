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


class WorkerExtension(CandidateCalls):
    """Adds the calls that `collective_rpc` makes by name to vLLM's worker class.

    They start and finish updates, with what the receivers of `TRANSPORTS` add to vLLM's own steps.
    """

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
