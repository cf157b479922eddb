"""Takes new weights into a vLLM engine while its actor runs: the same for rollout and teacher workers.

The learner's senders call the verbs of `WeightVerbs` on the actors; each passes on to an engine's `EngineUpdates`,
which calls vLLM's workers. Importing this loads no vLLM.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from cluster.contracts.errors import ActorDiedError, WeightSyncError
from cluster.vllm.weight_sync.shared_memory import mappable

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class TakesWeights(Protocol):
    """Takes new weights: an engine, or what wraps one."""

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Open the receiving end of the configured backend, once."""

    async def start_weight_update(self) -> None:
        """Stop using the weights, and make the model ready to receive."""

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive one bucket; where `update_info["buffer"]` holds its bytes, they stay there until the update ends."""

    async def finish_weight_update(self, policy_version: int) -> str:
        """Install the weights, drop caches computed with the old ones, go on; return the received checksum."""


UPDATE_CALLS = "cluster.vllm.weight_sync.updates.UpdateCalls"  # as vLLM names classes


class UpdateCalls:
    """Adds the calls that `collective_rpc` makes by name to vLLM's worker class.

    They start and finish updates, with what the receivers of `TRANSPORTS` add to vLLM's own steps.
    """

    weight_transfer_engine: Any  # one of TRANSPORTS' receivers
    start_weight_update: Callable[[], None]
    finish_weight_update: Callable[[], None]
    _update_is_open = False

    def begin_update(self) -> None:
        """Begin; what has come of an update that was begun before and never ended is overwritten by this one."""
        if self._update_is_open:
            self.finish_weight_update()  # vLLM begins no other before
        self.weight_transfer_engine.begin()
        self.start_weight_update()
        self._update_is_open = True

    def finish_and_report(self) -> dict[str, Any]:
        """Finish the update and return its outcome as plain values, which vLLM can pass between processes."""
        self.finish_weight_update()
        self._update_is_open = False
        report: dict[str, Any] = self.weight_transfer_engine.end()
        return report


class EngineUpdates:
    """Conducts the updates of one engine's weights."""

    def __init__(self, engine: "AsyncLLM", whose: str) -> None:
        """Take the engine; errors call it a `whose` engine, such as "rollout"."""
        self._engine, self._whose = engine, whose
        self.is_under_way = False
        self._buffers: list[pa.Buffer] = []  # of the update under way

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        with raised_as_death(self._whose):
            await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def start_weight_update(self) -> None:
        """Pause, keeping running requests, whose keys and values are computed anew under the new weights.

        An update under way is given up for this one, as when its sender lost another worker within a broadcast.
        """
        # Clearing the caches here, while nothing runs, covers both running requests and shared prefixes: vLLM puts the
        # former back in its queue. A reset after the update would fail as long as a request holds a block.
        # vLLM's `pause_generation` does the same and then sleeps for 20 ms, so that outputs on their way reach their
        # callers before it returns. Nothing here waits for that: each output carries the label of its weights.
        with raised_as_death(self._whose):
            await self._engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)
            await self._engine.collective_rpc("begin_update")
        self._buffers.clear()
        self.is_under_way = True

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive one bucket; where `update_info["buffer"]` holds its bytes, vLLM's processes map them."""
        buffer = update_info.get("buffer")
        if buffer is None:
            await self._update(update_info)
            return
        # Until the update ends: vLLM may read a bucket once more when a later one completes a packed layer.
        self._buffers.append(buffer)
        with mappable(buffer) as region:
            described = {name: value for name, value in update_info.items() if name != "buffer"}
            await self._update(described | asdict(region))

    async def install(self, policy_version: int) -> str:
        """Install the weights, and return the checksum of all ranks; raise WeightSyncError for a fault."""
        from cluster.vllm.compat import label_weights

        with raised_as_death(self._whose):
            # Nothing runs yet, so the label may come before or after the weights; both are sent at once.
            reports, _ = await asyncio.gather(
                self._engine.collective_rpc("finish_and_report"), label_weights(self._engine, policy_version)
            )
        self._buffers.clear()
        self.is_under_way = False
        return common_checksum(reports, policy_version)

    async def resume(self) -> None:
        """Go on with the new weights."""
        with raised_as_death(self._whose):
            await self._engine.resume_generation()

    async def _update(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        with raised_as_death(self._whose):
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))


class WeightVerbs:
    """Adds to an actor the verbs that the learner's senders call."""

    _is_updating = False
    _held_version: int | None = None
    _arriving_version: int | None = None

    @property
    def weights(self) -> TakesWeights:
        """Return what takes the weights."""
        raise NotImplementedError

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        await self.weights.init_weight_transfer(init_info)

    async def held_version(self) -> int | None:
        """Return the version whose changes alone this actor can take; None: it needs whole parameters."""
        return self._held_version

    async def start_weight_update(self, first: Sequence[Any] = ()) -> None:
        """Stop using the weights and get ready to receive, once the objects of `first` are on this node."""
        for reference in first:
            await reference
        self._held_version = self._arriving_version = None
        self._is_updating = True
        await self.weights.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive one bucket; a `reference` (in a list, so that Ray leaves it alone) is fetched to become `buffer`."""
        self._arriving_version = update_info.get("kept_as")
        if "reference" in update_info:
            others = {name: value for name, value in update_info.items() if name != "reference"}
            [reference] = update_info["reference"]
            update_info = others | {"buffer": await reference}
        await self.weights.update_weights(update_info)

    async def finish_weight_update(self, policy_version: int) -> str:
        """Install the weights as `policy_version`, go on, and return their checksum."""
        checksum = await self.weights.finish_weight_update(policy_version)
        self._held_version = self._arriving_version
        self._is_updating = False
        return checksum

    def refuse_half_updated(self) -> None:
        """Raise WeightSyncError if an update was begun and never ended, as when its sender died."""
        if self._is_updating:
            raise WeightSyncError("an update of the weights was begun and never ended; the engine must be started anew")


@contextmanager
def raised_as_death(whose: str) -> Iterator[None]:
    """Raise ActorDiedError, as calls to a dead actor do, where the engine's process is gone."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise ActorDiedError(f"the process of a {whose} engine is gone") from error


def common_checksum(reports: Sequence[dict[str, Any]], policy_version: int) -> str:
    """Return the checksum that all tensor-parallel workers report; raise WeightSyncError for a fault of one."""
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
