"""Plans the micro-batches of one optimizer step while its trajectories still arrive.

The gradients of a step add up, whatever the order and the cut, so the learner need not wait for the last trajectory. A
round is one micro-batch on every rank. Rounds go out when enough has arrived to fill them, or when the learner has
nothing to do; the last one, which may be empty, tells DeepSpeed that the step is complete.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from learner.packing import Grid, plan_step

Round = tuple[Grid, ...]  # one grid per rank


@dataclass
class RoundPlanner:
    """Collects trajectories and hands out rounds; every trajectory stands in exactly one of them.

    Example:
        >>> planner = RoundPlanner(num_ranks=2, micro_batch_tokens=4)
        >>> planner.add({0: 4, 1: 2})
        >>> planner.full_rounds()
        []
        >>> planner.add({2: 3})
        >>> planner.full_rounds()
        [(((0,),), ((2,),))]
        >>> planner.all_rounds()
        [(((1,),), ())]
    """

    num_ranks: int
    micro_batch_tokens: int
    _waiting: dict[int, int] = field(default_factory=dict)  # trajectories in no round yet, and their tokens

    def add(self, num_tokens: Mapping[int, int]) -> None:
        """Take in trajectories: index -> prompt and completion tokens."""
        self._waiting |= num_tokens

    def full_rounds(self) -> list[Round]:
        """Return the rounds that waiting trajectories fill: all planned ones but the last, which more may join."""
        return self._take(self._plan()[:-1])

    def all_rounds(self) -> list[Round]:
        """Return rounds for everything that waits; none where nothing does."""
        return self._take(self._plan())

    def _plan(self) -> list[Round]:
        if not self._waiting:
            return []
        indices = list(self._waiting)
        ranks = plan_step(list(self._waiting.values()), self.num_ranks, self.micro_batch_tokens).ranks
        return [tuple(_named(grid, indices) for grid in grids) for grids in zip(*ranks, strict=True)]

    def _take(self, rounds: list[Round]) -> list[Round]:
        for index in [index for grids in rounds for grid in grids for row in grid for index in row]:
            del self._waiting[index]
        return rounds


def _named(grid: Grid, indices: Sequence[int]) -> Grid:
    return tuple(tuple(indices[position] for position in row) for row in grid)
