"""Defines what an engine must do to serve a rollout worker; `teacher_workers/backends/base.py` does for teachers."""

from collections.abc import Sequence
from typing import Any, Protocol

from cluster.contracts.columns import Floats, Ints
from cluster.contracts.requests import Completion, SamplingSettings


class Generator(Protocol):
    """Samples completions."""

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        """Sample one completion; many calls run at once and are batched by the engine.

        When not all of them fit, those of the lowest `priority` run first.
        """


class RolloutEngine(Generator, Protocol):
    """Has the student's weights, which can be replaced while it runs (vLLM's weight-transfer verbs)."""

    async def prompt_logprobs(
        self, request_id: str, token_ids: Ints, places: Ints, count: int, priority: int
    ) -> tuple[Ints, Floats]:
        """Return ids and log-probabilities, at temperature 1, of given tokens and of the likeliest in their places.

        Both are [places, 1 + count]: the token at each place, after the first, then the `count` likeliest, best first.
        """

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Open the receiving end of the configured backend, once."""

    async def start_weight_update(self) -> None:
        """Pause generation, keeping running requests, and make the model ready to receive."""

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive one bucket."""

    async def finish_weight_update(self, policy_version: int) -> str:
        """Install the weights, drop caches computed with the old ones, resume; return the received checksum."""

    async def rest(self, policy_version: int) -> None:
        """Give up memory and weights until weights newer than this version come; an engine that need not, need not."""

    async def shutdown(self) -> None:
        """End the engine and every process it started."""
