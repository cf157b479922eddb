"""Decides when workers move between pools: from what steps took, and from what earlier moves achieved; pure.

Every move is a trial. The policy predicts it from the measured work of each pool, makes it when the predicted gain is
large enough, and rates it by the steps that follow; one that made them slower is taken back. Two rules keep it from
going to and fro: a split that was left is not taken up again while the load is what it was then, and every move back to
an earlier split doubles the number of steps before the next one.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, variance

from cluster.config.stages import BalanceConfig
from cluster.elastic.splits import (
    ALMOST,
    ROLLOUT,
    Sizes,
    Space,
    describe_sizes,
    mean_seconds,
    path_to_better,
    stage_seconds,
    step_seconds,
)
from cluster.elastic.step_cost import StepWork

WINDOW = 3  # times balance.observe_steps: the most steps that a decision is based on, and that a trial lasts
WORSE = 0.02  # share by which steps may become slower before a move is taken back
MUCH_WORSE = 1.5  # times slower: two steps are enough to take a move back
SURE = 2.0  # standard errors
ALIKE = 0.3  # share by which every pool's part of the load may differ from another time's, to count as the same load
SMALL = 0.02  # parts of the load below this do not count


@dataclass(frozen=True)
class Horizon:
    """Says what a move costs, and when it has to pay."""

    steps_ahead: int  # of generation: rollout.max_staleness
    start_seconds: float  # which a new worker takes to start, as far as is known
    patience_seconds: float  # for new workers to start; then the move is taken back


@dataclass(frozen=True)
class BalanceSample:
    """Holds what the policy reads of one step."""

    sizes: Sizes  # as wanted
    is_settled: bool  # whether all workers served from its beginning to its end
    seconds: float  # since the step before
    steps_left: int
    work: StepWork | None  # None: it cannot be said


@dataclass(frozen=True)
class Decision:
    """Holds what changes, and why."""

    sentence: str
    sizes: Sizes | None = None  # None: they stay


@dataclass
class _Trial:
    """Holds a move that is not rated yet."""

    before: Sizes
    works: Sequence[StepWork]  # of the steps before it
    bar: float  # factor by which steps may become slower
    waited_seconds: float = 0.0  # for its workers

    def changes(self, works: Sequence[StepWork]) -> tuple[float, float]:
        """Return by which factor steps became slower, per token, and its standard error."""
        was, became = ([work.seconds / work.tokens for work in some] for some in (self.works, works))
        error = math.sqrt(_error2(was) + _error2(became)) / fmean(was)
        return fmean(became) / fmean(was), error


Load = Mapping[str, float]  # each pool's part of all work


@dataclass
class Balance:
    """Takes in every step, and says what changes."""

    space: Space
    config: BalanceConfig
    horizon: Horizon
    _sizes: Sizes = field(default_factory=dict)
    _trial: _Trial | None = None
    _left: dict[tuple[int, ...], Load] = field(default_factory=dict)  # splits, and the load when they were left
    _steps_here: int = 0
    _num_returns: int = 0
    _backs_off: bool = False  # after a move that was taken back, and until one is kept

    def __post_init__(self) -> None:
        self._start_seconds = self.horizon.start_seconds
        self._works: deque[StepWork] = deque(maxlen=WINDOW * self.config.observe_steps)

    @property
    def is_trying(self) -> bool:
        return self._trial is not None

    def decide(self, sample: BalanceSample) -> Decision | None:
        """Take in one step, and return what is to change or to be said after it."""
        if dict(sample.sizes) != dict(self._sizes):
            return self._begin_anew(sample.sizes)
        if not sample.is_settled or sample.work is None:
            return self._wait(sample)
        self._works.append(sample.work)
        self._steps_here += 1
        return self._rate_trial(self._trial) if self._trial else self._consider(sample)

    def _begin_anew(self, sizes: Sizes) -> Decision | None:
        """Observe from the beginning: the sizes were set from outside, and what was learned of others may not hold."""
        is_first = not self._sizes
        self.space = replace(self.space, units=self.space.units_of(sizes))
        self._trial, self._backs_off, self._num_returns = None, False, 0
        self._left.clear()
        self._arrive(sizes)
        return None if is_first else Decision(f"observing anew, with {describe_sizes(sizes)}")

    def _wait(self, sample: BalanceSample) -> Decision | None:
        """Pass over a step in which workers start, leave or are started again."""
        trial = self._trial
        if trial is None or self._steps_here:
            return None
        trial.waited_seconds += sample.seconds
        if trial.waited_seconds <= self.horizon.patience_seconds:
            return None
        return self._take_back(trial, f"its workers did not start within {self.horizon.patience_seconds:.0f} s")

    def _rate_trial(self, trial: _Trial) -> Decision | None:
        """Compare the steps since a move with those before it, as soon as that says something."""
        if self._steps_here == 1 and trial.waited_seconds:
            self._start_seconds = trial.waited_seconds
        if self._steps_here < 2:
            return None
        factor, error = trial.changes(list(self._works))
        if factor > MUCH_WORSE:
            return self._take_back(trial, f"steps became {factor:.2f} times as long")
        is_clear = abs(factor - trial.bar) > SURE * error or self._steps_here >= WINDOW * self.config.observe_steps
        if self._steps_here < self.config.observe_steps or not is_clear:
            return None
        change = f"steps became {abs(factor - 1):.0%} {'shorter' if factor < 1 else 'longer'}"
        if factor > trial.bar:
            return self._take_back(trial, change)
        self._trial, self._backs_off = None, False
        return Decision(f"kept {describe_sizes(self._sizes)}: {change}")

    def _take_back(self, trial: _Trial, why: str) -> Decision:
        self._left[_key(self._sizes)] = load_of(trial.works, trial.before)
        sentence = f"{describe_move(self._sizes, trial.before)}, taken back: {why}"
        self._trial, self._backs_off = None, True
        self._num_returns += 1
        self._arrive(trial.before)
        return Decision(sentence, trial.before)

    def _consider(self, sample: BalanceSample) -> Decision | None:
        cooldown = self.config.cooldown_steps * 2**self._num_returns
        if len(self._works) < self.config.observe_steps or self._steps_here < cooldown:
            return None
        works, ahead = list(self._works), self.horizon.steps_ahead
        path = path_to_better(self.space.within_reach(self._sizes), works, self._sizes, ahead)
        others = path[1:2] if self._backs_off else path[1:]
        allowed = [sizes for sizes in others if self._pays(sizes, works, sample.steps_left)]
        if not allowed:
            return self._probe(works, sample.steps_left)
        best = min(mean_seconds(works, sizes, ahead) for sizes in allowed)
        target = next(sizes for sizes in allowed if mean_seconds(works, sizes, ahead) <= ALMOST * best)
        return self._move(target, works, is_probe=False)

    def _probe(self, works: Sequence[StepWork], steps_left: int) -> Decision | None:
        """Give the rollout pool what another can spare, if only in the best case more rollout workers shorten the step.

        A step's batches do not say how much a full engine slows each of its completions; one trial does.
        """
        ahead, here = self.horizon.steps_ahead, self._sizes
        optimistic = [replace(work, generation=work.generation.optimistic(here[ROLLOUT])) for work in works]
        slack = ALMOST * mean_seconds(works, here, ahead)
        for sizes in self.space.within_reach(here).exchanges(here):
            costs_nothing = sizes[ROLLOUT] > here[ROLLOUT] and mean_seconds(works, sizes, ahead) <= slack
            if costs_nothing and self._pays(sizes, optimistic, steps_left):
                return self._move(sizes, optimistic, is_probe=True)
        return None

    def _pays(self, sizes: Sizes, works: Sequence[StepWork], steps_left: int) -> bool:
        """Return whether a split is so much better that moving there pays, now and in the run's remaining steps."""
        ahead, here = self.horizon.steps_ahead, self._sizes
        gains = [step_seconds(work, here, ahead) - step_seconds(work, sizes, ahead) for work in works]
        seconds = fmean(work.seconds for work in works)
        least = self.config.min_gain
        if _key(sizes) in self._left:
            if is_alike(self._left[_key(sizes)], load_of(works, here)):
                return False
            least *= 2
        gain = fmean(gains)
        if gain < least * seconds or gain < SURE * math.sqrt(_error2(gains)):
            return False
        meanwhile = {name: min(size, sizes[name]) for name, size in here.items()}
        slower = mean_seconds(works, meanwhile, ahead) / mean_seconds(works, here, ahead)
        return gain * steps_left > self._start_seconds * max(0.0, 1 - 1 / slower)

    def _move(self, target: Sizes, works: Sequence[StepWork], is_probe: bool) -> Decision:
        before, ahead = self._sizes, self.horizon.steps_ahead
        seconds = fmean(work.seconds for work in works)
        gain = mean_seconds(works, before, ahead) - mean_seconds(works, target, ahead)
        sentence = (
            f"{describe_move(before, target)}: of a step's {seconds:.2f} s {describe_load(works, before)}; "
            f"{seconds - gain:.2f} s are {'possible' if is_probe else 'expected'} ({-gain / seconds:.0%})"
        )
        self._num_returns += _key(target) in self._left
        self._left[_key(before)] = load_of(works, before)
        self._trial = _Trial(before, works, 1 - WORSE if is_probe else 1 + WORSE)
        self._arrive(target)
        return Decision(sentence, target)

    def _arrive(self, sizes: Sizes) -> None:
        self._sizes = dict(sizes)
        self._works.clear()
        self._steps_here = 0


def load_of(works: Sequence[StepWork], sizes: Sizes) -> Load:
    """Return every pool's part of the work, the learner's and the longest completion's included; they add up to 1."""
    seconds = {name: share * sizes[name] for name, share in stage_seconds(works, sizes).items()}
    seconds["learner"] = fmean(work.learn_seconds for work in works)
    seconds["longest"] = fmean(work.generation.longest_seconds for work in works)
    return {name: value / sum(seconds.values()) for name, value in seconds.items()}


def is_alike(one: Load, other: Load) -> bool:
    """Return whether two loads are about the same.

    Example:
        >>> is_alike({"rollout": 0.5, "learner": 0.5}, {"rollout": 0.6, "learner": 0.4})
        True
        >>> is_alike({"rollout": 0.5, "learner": 0.5}, {"rollout": 0.8, "learner": 0.2})
        False
    """
    return all(abs(one[name] - other[name]) <= max(SMALL, ALIKE * max(one[name], other[name])) for name in one)


def describe_move(before: Sizes, after: Sizes) -> str:
    """Say which pools change.

    Example:
        >>> describe_move({"rollout": 4, "teachers.a": 1}, {"rollout": 3, "teachers.a": 2})
        'rollout 4 -> 3, teachers.a 1 -> 2'
    """
    return ", ".join(f"{name} {size} -> {after[name]}" for name, size in before.items() if after[name] != size)


def describe_load(works: Sequence[StepWork], sizes: Sizes) -> str:
    """Say how much of a step every pool's workers work, and what waits for them."""
    seconds = fmean(work.seconds for work in works)
    parts = []
    for name, busy in stage_seconds(works, sizes).items():
        queued = fmean(work.teachers[name].queued if name in work.teachers else 0.0 for work in works)
        waits = "" if name == ROLLOUT else f" with {queued:.1f} batches at hand"
        parts.append(f"{name} works {min(1.0, busy / seconds):.0%}{waits}")
    return ", ".join(parts)


def _key(sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes[name] for name in sorted(sizes))


def _error2(values: Sequence[float]) -> float:
    """Return the square of the standard error of a mean; 0 where one value says nothing of it."""
    return variance(values) / len(values) if len(values) > 1 else 0.0
