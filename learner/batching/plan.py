"""Plans one optimizer step: which rank computes which trajectories, in which micro-batch, at which place of its grid.

A micro-batch is a grid of [rows, row_length] tokens. Trajectories stand one after the other in a grid row and none is
split, so attention costs rows x row_length^2, and the longest trajectory alone decides row_length. Trajectories are
placed from the longest to the shortest: those that share a grid are of similar length, and little of it is padding.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# The rows of one micro-batch, of indices of trajectories that stand one after the other; no rows: padding alone.
Grid = tuple[tuple[int, ...], ...]


def plan_step(num_tokens: Sequence[int], num_ranks: int, micro_batch_tokens: int) -> tuple[tuple[Grid, ...], ...]:
    """Share the trajectories out over ranks and micro-batches; return the micro-batches of each rank, in order.

    Ranks that would run fewer micro-batches get empty ones, because the collectives of ZeRO wait for every rank.

    Args:
        num_tokens: prompt and completion tokens of each trajectory.
        num_ranks: learner processes.
        micro_batch_tokens: the largest grid, padding included; a longer trajectory gets a grid of its own.

    Example:
        >>> plan_step([4, 3, 2], num_ranks=1, micro_batch_tokens=6)
        ((((0,),), ((1,), (2,))),)
    """
    shares = balance(num_tokens, num_ranks)
    grids = [_plan_grids(num_tokens, share, micro_batch_tokens) for share in shares]
    most = max(1, *(len(of_rank) for of_rank in grids))
    return tuple((*of_rank, *[()] * (most - len(of_rank))) for of_rank in grids)


def balance(num_tokens: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Give each trajectory, from the longest to the shortest, to the rank with the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in _longest_first(num_tokens, range(len(num_tokens))):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += num_tokens[index]
    return shares


def _plan_grids(num_tokens: Sequence[int], share: Sequence[int], micro_batch_tokens: int) -> list[Grid]:
    waiting = _longest_first(num_tokens, share)
    grids = []
    while waiting:
        grid, waiting = _fill_grid(num_tokens, waiting, micro_batch_tokens)
        grids.append(grid)
    return grids


def _fill_grid(num_tokens: Sequence[int], waiting: Sequence[int], micro_batch_tokens: int) -> tuple[Grid, list[int]]:
    """Place what fits by first-fit decreasing; return the grid and what did not fit."""
    row_length = max(1, num_tokens[waiting[0]])
    rows: list[list[int]] = []
    free_tokens: list[int] = []
    most_free = -1  # of a row that is there
    max_rows = max(1, micro_batch_tokens // row_length)
    left_over: list[int] = []
    position = 0
    while position < len(waiting):
        index = waiting[position]
        needed = num_tokens[index]
        if needed <= most_free:
            row = next(row for row, free in enumerate(free_tokens) if free >= needed)
        elif len(rows) < max_rows:
            row = len(rows)
            rows.append([])
            free_tokens.append(row_length)
        else:  # pass over all that are too long for what is left
            after = bisect_left(waiting, -most_free, lo=position, key=lambda index: -num_tokens[index])
            left_over += waiting[position:after]
            position = after
            continue
        rows[row].append(index)
        free_tokens[row] -= needed
        most_free = max(free_tokens)
        position += 1
    return tuple(tuple(row) for row in rows), left_over


def _longest_first(num_tokens: Sequence[int], indices: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda index: (-num_tokens[index], index))


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

    @property
    def num_waiting(self) -> int:
        """Return how many trajectories are in no round yet."""
        return len(self._waiting)

    def add(self, num_tokens: Mapping[int, int]) -> None:
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
        ranks = plan_step(list(self._waiting.values()), self.num_ranks, self.micro_batch_tokens)
        return [tuple(_named(grid, indices) for grid in grids) for grids in zip(*ranks, strict=True)]

    def _take(self, rounds: list[Round]) -> list[Round]:
        for index in [index for grids in rounds for grid in grids for row in grid for index in row]:
            del self._waiting[index]
        return rounds


def _named(grid: Grid, indices: Sequence[int]) -> Grid:
    return tuple(tuple(indices[position] for position in row) for row in grid)
