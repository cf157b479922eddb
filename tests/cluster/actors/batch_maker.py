"""A worker that does nothing but make batches; a module of its own, so that an actor can import it."""

from cluster.actors.object_store import pack
from cluster.contracts.batches import BatchHandle
from cluster.contracts.pieces import Pieces
from cluster.contracts.trajectory import make_generated
from tests.builders import make_trajectory


class BatchMaker:
    """Returns batches as the pools' actors do."""

    async def make(self, trajectory_id: int) -> tuple[Pieces, BatchHandle]:
        """Return one small batch."""
        return pack(make_generated([make_trajectory(trajectory_id=trajectory_id)]), {})

    def shutdown(self) -> None:
        """End nothing."""
