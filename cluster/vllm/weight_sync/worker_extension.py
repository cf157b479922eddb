"""Adds the calls of a weight update to vLLM's worker class."""

from collections.abc import Callable
from typing import Any

UPDATE_CALLS = "cluster.vllm.weight_sync.worker_extension.UpdateCalls"  # as vLLM names classes


class UpdateCalls:
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
