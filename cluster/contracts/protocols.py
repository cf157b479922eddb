"""Defines what an engine must do to serve a rollout or teacher worker."""

from collections.abc import Sequence
from typing import Any, Protocol

from cluster.contracts.requests import Completion, HiddenStates, SamplingSettings
from cluster.contracts.trajectory import Bytes, Ints


class RolloutEngine(Protocol):
    """Samples completions; its weights can be replaced while it runs (vLLM's weight-transfer verbs)."""

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        """Sample one completion; many calls run at once and are batched by the engine.

        When not all of them fit, those of the lowest `priority` run first.
        """

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Open the receiving end of the configured backend, once."""

    async def start_weight_update(self) -> None:
        """Pause generation, keeping running requests, and make the model ready to receive."""

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive one bucket."""

    async def finish_weight_update(self, policy_version: int) -> str:
        """Install the weights, drop caches computed with the old ones, resume; return the received checksum."""

    async def shutdown(self) -> None:
        """End the engine and every process it started."""


class ScoringEngine(Protocol):
    """Reads tokens that another model wrote."""

    async def hidden_states(self, request_id: str, token_ids: Ints, loss_mask: Bytes) -> HiddenStates:
        """Return the last hidden states, after the final norm, that predict the tokens whose loss_mask is 1."""

    @property
    def is_dead(self) -> bool:
        """Return whether the engine's process is gone."""

    async def sleep(self) -> None:
        """Give the hardware back to another engine; nothing is asked until it is woken."""

    async def wake(self) -> None:
        """Take the hardware again."""

    async def shutdown(self) -> None:
        """End the engine and every process it started."""
