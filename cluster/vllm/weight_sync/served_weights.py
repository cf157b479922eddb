"""Keeps scores of a model and the updates of its weights apart."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.vllm.weight_sync.updates import TakesWeights


class ServedWeights:
    """Lets one version of the weights score each batch, whole.

    An update waits until no batch is being scored; batches that come meanwhile wait for its end. One that never ends
    lets them wait for ever: the pool then starts the actor again (`TeacherPool.abandon`).
    """

    def __init__(self, engine: TakesWeights) -> None:
        """Take an engine, or what wraps one, that serves what it has loaded itself, which is version 0."""
        self._engine = engine
        self._version = self._num_users = 0
        self._is_updating = False
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[int]:
        """Use the weights for as long as the context lasts, and give their version."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._is_updating)
            self._num_users += 1
        try:
            yield self._version
        finally:
            async with self._changed:
                self._num_users -= 1
                self._changed.notify_all()

    async def init_weight_transfer(self, init_info: dict[str, object]) -> None:
        await self._engine.init_weight_transfer(init_info)

    async def start_weight_update(self) -> None:
        async with self._changed:
            self._is_updating = True
            await self._changed.wait_for(lambda: not self._num_users)
        await self._engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, object]) -> None:
        await self._engine.update_weights(update_info)

    async def finish_weight_update(self, policy_version: int) -> str:
        checksum = await self._engine.finish_weight_update(policy_version)
        async with self._changed:
            self._version, self._is_updating = policy_version, False
            self._changed.notify_all()
        return checksum
