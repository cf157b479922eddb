"""A checkpoint that is being written while training goes on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contracts.errors import PreceptorError
from learner import checkpoint
from learner.manifest import Layout, WrittenShard


@dataclass(frozen=True)
class CheckpointSeconds:
    """What a checkpoint cost."""

    held: float  # training waited for the copy to host memory, on the slowest rank
    writing: float  # of the slowest rank


class PendingCheckpoint:
    """Asks the ranks to write their shards, and completes the folder when all have.

    An error of any rank removes the partial folder; earlier checkpoints are not touched.
    """

    def __init__(self, folder: Path, state: Mapping[str, Any], layout: Layout, ask: Callable[..., list[Any]]) -> None:
        """Begin: returns when every rank has copied its state.

        Args:
            folder: the checkpoint's, on a file system that all ranks and the driver share.
            state: the driver's own, JSON values; nobody may change it any more.
            layout: of the ranks.
            ask: calls a method of every rank, as `LearnerGroup` does.
        """
        self.folder = folder
        self._state, self._layout, self._ask = state, layout, ask
        partial = checkpoint.begin(folder)
        self._held_seconds = max(self._ask_or_discard("begin_shard", partial))

    @property
    def is_written(self) -> bool:
        """Return whether `complete` would not wait for a rank."""
        return all(self._ask_or_discard("shard_is_written"))

    def complete(self) -> CheckpointSeconds:
        """Wait for the ranks and give the folder its name.

        Raises:
            CheckpointError: the disk is full or the place cannot be written to; nothing of the checkpoint is left.
            ActorError: a rank died.
        """
        shards: list[WrittenShard] = self._ask_or_discard("finish_shard")
        try:
            checkpoint.commit(self.folder, self._state, self._layout, [shard.entry for shard in shards])
        except PreceptorError:
            checkpoint.discard(self.folder)
            raise
        return CheckpointSeconds(self._held_seconds, max(shard.write_seconds for shard in shards))

    def _ask_or_discard(self, method: str, *args: Any) -> list[Any]:
        try:
            return self._ask(method, *args, waiting_for=f"the learner to write checkpoint {self.folder}")
        except PreceptorError:
            checkpoint.discard(self.folder)
            raise
