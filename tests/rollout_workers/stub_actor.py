"""An actor that answers as RolloutActor does, without an engine; a module of its own, so that Ray can import it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.actors.object_store import pack
from cluster.contracts.batches import BatchHandle
from cluster.contracts.pieces import Pieces
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from cluster.contracts.trajectory import make_generated
from tests.builders import make_trajectory


class StubRolloutActor:
    """Writes `seed` tokens for each request, one batch per request, in the order in which it was given them."""

    def __init__(self, settings: Any) -> None:
        self._left: dict[int, list[RolloutRequest]] = {}
        self._rests: list[int] = []

    async def start(self) -> None:
        """Start nothing."""

    async def set_prompts(self, wire: pa.Buffer) -> None:
        """Need none."""

    async def start_rollout(
        self, call: int, requests: Sequence[RolloutRequest], sampling: SamplingSettings, priority: int
    ) -> tuple[Pieces, BatchHandle]:
        """Take the requests and answer the first."""
        self._left[call] = list(requests)
        return await self.next_batch(call)

    async def next_batch(self, call: int) -> tuple[Pieces, BatchHandle]:
        """Answer the next request."""
        request = self._left[call].pop(0)
        row = make_trajectory(
            completion=np.full(request.seed, 3), trajectory_id=request.trajectory_id, prompt_id=request.prompt_id
        )
        wire, handle = pack(make_generated([row]), {})
        return wire, replace(handle, is_last=not self._left[call])

    async def rest(self, policy_version: int) -> None:
        """Note when memory is to be given back."""
        self._rests.append(policy_version)

    async def rests(self) -> list[int]:
        """Return the versions after which it was."""
        return self._rests

    async def shutdown(self) -> None:
        """End nothing."""
