"""Gives the GPU memory of a vLLM engine back for a time, beside others that use the same GPU.

vLLM's own `sleep` compares what is free on the whole GPU before and after, and ends the engine where another process
took more meanwhile than it gave back. That is when a learner begins to need it.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from cluster.vllm.compat import suspend
from cluster.vllm.weight_sync.loading import BUFFERS


class SleepCalls:
    """Adds the calls that `collective_rpc` makes by name to vLLM's worker class."""

    model_runner: Any
    wake_up: Callable[[], None]
    _kept_values: Mapping[str, torch.Tensor] = MappingProxyType({})

    def give_memory(self, keeps_weights: bool) -> None:
        """Free weights and cache; the weights stay in host memory, or are gone until an update brings others."""
        _synchronize()
        values = {} if keeps_weights else not_in_updates(self.model_runner.model)
        self._kept_values = {name: value.detach().to("cpu", copy=True) for name, value in values.items()}
        suspend(self, keeps_weights)
        _synchronize()

    def take_memory(self) -> None:
        """Take the memory again, with all values that were kept in it."""
        self.wake_up()
        values = not_in_updates(self.model_runner.model) if self._kept_values else {}
        for name, kept in self._kept_values.items():
            values[name].data.copy_(kept)
        self._kept_values = {}


def not_in_updates(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what of a vLLM model no update brings: its buffers, such as the positions' frequencies, and BUFFERS."""
    parameters = {name: value for name, value in model.named_parameters() if name.endswith(BUFFERS)}
    return dict(model.named_buffers()) | parameters


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


async def put_to_sleep(engine: Any, keeps_weights: bool) -> None:
    """Free the memory of an AsyncLLM that has no requests; what its caches held is forgotten."""
    await engine.engine_core.pause_scheduler_async(mode="abort", clear_cache=True)
    await engine.collective_rpc("give_memory", args=(keeps_weights,))


async def wake(engine: Any) -> None:
    """Take the memory again, and go on."""
    await engine.collective_rpc("take_memory")
    await engine.resume_generation()
