"""Predicts how long a step takes with workers split otherwise, and finds a better split; pure."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

from cluster.elastic.step_cost import StepWork

ROLLOUT = "rollout"
REACH = 2  # a pool becomes at most so many times larger or smaller at a time: beyond, the prediction is a guess
ALMOST = 1.01  # of the best split's seconds: what is good enough to stop moving workers

Sizes = Mapping[str, int]  # workers by pool: "rollout", "teachers.NAME"


@dataclass(frozen=True)
class PoolRule:
    """Limits the size of a pool."""

    units: int  # GPUs of a worker; 1 where there are none
    least: int = 1
    most: int | None = None


@dataclass(frozen=True)
class Space:
    """Holds every split that is allowed."""

    rules: Mapping[str, PoolRule]
    units: int  # that all workers have together
    fits: Callable[[Sizes], bool] = lambda sizes: True  # whether the nodes can hold it

    def units_of(self, sizes: Sizes) -> int:
        """Return what the workers of a split have together."""
        return sum(self.rules[name].units * size for name, size in sizes.items())

    def within_reach(self, sizes: Sizes) -> "Space":
        """Return the part that one move from `sizes` may lead to; a pool outside its limits may stay where it is."""
        rules = {}
        for name, rule in self.rules.items():
            size = sizes[name]
            least = max(min(rule.least, size), -(-size // REACH))
            most = size * REACH if rule.most is None else min(max(rule.most, size), size * REACH)
            rules[name] = replace(rule, least=least, most=most)
        return replace(self, rules=rules)

    def exchanges(self, sizes: Sizes) -> Iterator[Sizes]:
        """Yield the splits in which one pool gives as few workers as it must, and one has as many more as that gives.

        Example:
            >>> rules = {"rollout": PoolRule(units=1), "teachers.main": PoolRule(units=2)}
            >>> list(Space(rules, units=6).exchanges({"rollout": 4, "teachers.main": 1}))
            [{'rollout': 2, 'teachers.main': 2}]
        """
        free = self.units - self.units_of(sizes)
        for giver, taker in permutations(sizes, 2):
            gives, takes = self.rules[giver], self.rules[taker]
            num_given = max(1, math.ceil((takes.units - free) / gives.units))
            num_taken = (free + num_given * gives.units) // takes.units
            num_taken = num_taken if takes.most is None else min(num_taken, takes.most - sizes[taker])
            split = {**sizes, giver: sizes[giver] - num_given, taker: sizes[taker] + num_taken}
            if num_taken > 0 and split[giver] >= gives.least and self.fits(split):
                yield split


def describe_sizes(sizes: Sizes) -> str:
    """Say a split as `preceptor scale` takes it."""
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def step_seconds(work: StepWork, sizes: Sizes, steps_ahead: int) -> float:
    """Return how long a step takes by what was measured of it; overheads that no split changes are left out.

    Every stage ends after the one before it, and not before it has done its own work. Where generation runs ahead,
    the stages of several steps overlap, and the slowest of them counts.
    """
    generated = work.generation.seconds(sizes[ROLLOUT])
    first = generated * work.first_share
    alone = [work.teachers[name].busy_seconds / sizes[name] for name in work.teachers]
    scored = max(
        [
            generated,
            *(generated + teacher.last_seconds for teacher in work.teachers.values()),
            *(first + seconds for seconds in alone),
        ]
    )
    learned = max(scored + work.last_learn_seconds, first + work.learn_seconds)
    in_turn = learned + work.sync_seconds
    full = work.generation.full_seconds / sizes[ROLLOUT]
    return max(in_turn / (1 + steps_ahead), full, *alone, work.learn_seconds + work.sync_seconds)


def mean_seconds(works: Sequence[StepWork], sizes: Sizes, steps_ahead: int) -> float:
    """Return the mean over steps: the best split of a mean step is not the best of steps that differ."""
    return sum(step_seconds(work, sizes, steps_ahead) for work in works) / len(works)


def path_to_better(space: Space, works: Sequence[StepWork], sizes: Sizes, steps_ahead: int) -> list[Sizes]:
    """Return splits of which each is the best that one exchange makes of the one before, first of all `sizes`.

    Where no exchange shortens the step, one that shortens the slowest stage counts: two pools may hold the step up
    together, and the second exchange is then the one that shows.
    """

    def badness(sizes: Sizes) -> tuple[float, list[float]]:
        return mean_seconds(works, sizes, steps_ahead), sorted(stage_seconds(works, sizes).values(), reverse=True)

    path = [sizes]
    while True:
        best = min(space.exchanges(path[-1]), key=badness, default=path[-1])
        if badness(best) >= badness(path[-1]):
            return path
        path.append(best)


def stage_seconds(works: Sequence[StepWork], sizes: Sizes) -> dict[str, float]:
    """Return how long every pool's workers are at work in a step, on average over workers and steps."""
    return {name: sum(_busy(work, name) for work in works) / len(works) / size for name, size in sizes.items()}


def _busy(work: StepWork, pool: str) -> float:
    if pool == ROLLOUT:
        return work.generation.full_seconds
    return work.teachers[pool].busy_seconds if pool in work.teachers else 0.0
