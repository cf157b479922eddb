"""Looks for the split of a number of GPUs whose steps are the shortest, in simulated time.

From the split that gives every pool its share of the work, GPUs are moved from pool to pool, many at a time at first,
as long as that makes steps shorter. A large run is searched as a small one with the same ratios of everything; the best
is then simulated in full.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from cluster.config.run_config import Config
from cluster.contracts.errors import ConfigError
from cluster.simulation.rates import Rates, seconds_per_token
from cluster.simulation.simulated_run import Demand, Prediction, Split, simulate

ROWS_OF_A_SMALL_RUN = 256  # per step; the search's time grows with them, its result hardly changes
SEARCHED_STEPS, PREDICTED_STEPS = 3, 6  # simulated of each split; of the best one
FINER = 4  # times as large is the second run that is searched
LEAST_GAIN = 0.005  # of a step's seconds; below it a move is not worth while

Gpus = dict[str, int]  # of each pool, by its name on the command line


@dataclass(frozen=True)
class Widths:
    """Says how many GPUs one worker of each pool takes, and the fewest workers it can have."""

    gpus: Mapping[str, int]
    fewest: Mapping[str, int]

    @classmethod
    def of(cls, config: Config) -> "Widths":
        """Read them from a run: engines by their tensor parallelism; the learner's ranks must hold the student."""
        teachers = {f"teachers.{name}": teacher.engine.tensor_parallel for name, teacher in config.teachers.items()}
        gpus = {"rollout": config.rollout.engine.tensor_parallel, **teachers, "learner": 1}
        fewest = {name: config.learner.num_workers if name == "learner" else 1 for name in gpus}
        return cls(gpus, fewest)

    @property
    def fewest_gpus(self) -> int:
        return sum(self.gpus[name] * self.fewest[name] for name in self.gpus)

    def split(self, gpus: Gpus) -> Split:
        """Return the workers that so many GPUs hold."""
        sizes = {name: num // self.gpus[name] for name, num in gpus.items()}
        teachers = {name.removeprefix("teachers."): n for name, n in sizes.items() if name.startswith("teachers.")}
        return Split(sizes["rollout"], teachers, sizes["learner"])

    def gpus_of(self, split: Split) -> Gpus:
        return {name: size * self.gpus[name] for name, size in split.sizes.items()}


@dataclass(frozen=True)
class Plan:
    """Holds the best split that the search tried."""

    best: Prediction
    tried: tuple[Prediction, ...]  # in the order in which they were tried, of the last run that was searched
    scale: int  # how many times smaller that run was


@dataclass
class _Search:
    """Tries splits of one run, and simulates none twice."""

    config: Config
    rates: Rates
    widths: Widths
    demand: Demand
    num_steps: int
    tried: dict[str, Prediction] = field(default_factory=dict)

    def predict(self, split: Split) -> Prediction:
        if str(split) not in self.tried:
            self.tried[str(split)] = simulate(self.config, self.rates, split, self.demand, self.num_steps)
        return self.tried[str(split)]

    def descend(self, gpus: Gpus, most_moved: int) -> Gpus:
        """Move GPUs between pools, half as many each time no move helps, and return where that ends."""
        moved = most_moved
        while moved:
            better = self._best_move(gpus, moved)
            gpus, moved = (better, moved) if better else (gpus, moved // 2)
        return gpus

    def _best_move(self, gpus: Gpus, moved: int) -> Gpus | None:
        """Return the best split that one move leads to, if it is better."""
        now = self.predict(self.widths.split(gpus)).mean_step_seconds
        moves = {str(self.widths.split(other)): other for other in self._moves(gpus, moved)}
        seconds = {name: self.predict(self.widths.split(other)).mean_step_seconds for name, other in moves.items()}
        best = min(seconds, key=seconds.__getitem__, default=None)
        return moves[best] if best is not None and seconds[best] <= now * (1 - LEAST_GAIN) else None

    def _moves(self, gpus: Gpus, moved: int) -> Iterator[Gpus]:
        for giver in gpus:
            width, fewest = self.widths.gpus[giver], self.widths.fewest[giver]
            given = min(-(-moved // width) * width, gpus[giver] - fewest * width)
            if given <= 0:
                continue
            for taker in gpus:
                if taker != giver:
                    yield {**gpus, giver: gpus[giver] - given, taker: gpus[taker] + given}


def find_split(config: Config, rates: Rates, num_gpus: int) -> Plan:
    """Return the best split of so many GPUs that the search finds; raise ConfigError if they are too few."""
    widths = Widths.of(config)
    if num_gpus < widths.fewest_gpus:
        raise ConfigError(
            f"--gpus {num_gpus}: one engine per pool and the {config.learner.num_workers} ranks of "
            f"learner.num_workers take {widths.fewest_gpus}; plan with at least as many"
        )
    scale = _scale(config, widths, num_gpus)
    search = _Search(*_scaled(config, rates, scale), SEARCHED_STEPS)
    gpus = shares(search.config, rates, search.widths, num_gpus // scale)
    gpus = search.descend(gpus, most_moved=max(1, num_gpus // scale // 8))
    if scale >= 2 * FINER:  # another search, of a larger run, around the first's best
        scale //= FINER
        search = _Search(*_scaled(config, rates, scale), SEARCHED_STEPS)
        gpus = {name: num * FINER for name, num in gpus.items()}
        gpus = search.descend(_with_rest(gpus, num_gpus // scale, search), most_moved=FINER // 2)
    gpus = _with_rest({name: num * scale for name, num in gpus.items()}, num_gpus, search)
    best = simulate(config, rates, widths.split(gpus), Demand(config, rates), PREDICTED_STEPS)
    return Plan(best, tuple(search.tried.values()), scale)


def _with_rest(gpus: Gpus, num_gpus: int, search: _Search) -> Gpus:
    """Give GPUs that are left to the pool whose engines have the most work for each of theirs, if they fit there."""
    left = num_gpus - sum(gpus.values())
    work = work_seconds(search.config, search.rates, search.widths)
    neediest = max(
        (name for name in gpus if left % search.widths.gpus[name] == 0), key=lambda name: work[name] / gpus[name]
    )
    return {**gpus, neediest: gpus[neediest] + left}


def shares(config: Config, rates: Rates, widths: Widths, num_gpus: int) -> Gpus:
    """Give each pool GPUs in proportion to its work, at least those of its fewest workers."""
    work = work_seconds(config, rates, widths)
    gpus = {name: widths.gpus[name] * widths.fewest[name] for name in work}
    while True:
        # The next worker goes where the work of a GPU is the longest.
        left = num_gpus - sum(gpus.values())
        fitting = [name for name in work if widths.gpus[name] <= left]
        if not fitting:
            return gpus
        needy = max(fitting, key=lambda name: work[name] / gpus[name])
        gpus[needy] += widths.gpus[needy]


def work_seconds(config: Config, rates: Rates, widths: Widths) -> dict[str, float]:
    """Return the GPU-seconds of a step in each pool, with engines that are always full."""
    prompt_tokens, completion_tokens = Demand(config, rates).tokens_per_step()
    tokens = prompt_tokens + completion_tokens
    points, most = rates.rollout.seconds_per_token, config.rollout.engine.concurrent_sequences
    rollout = completion_tokens * min(seconds_per_token(points, running) / running for running in (1, most))
    work = {"rollout": rollout * widths.gpus["rollout"]}
    shares_of_routes = sum(rates.teachers[route].share for route in config.routes)
    for name in config.teachers:
        scored = sum(
            rates.teachers[route].share / shares_of_routes
            for route in config.routes
            for scorer, _ in config.scorers(route)
            if scorer == name
        )
        key = f"teachers.{name}"
        work[key] = tokens * scored / rates.teachers[name].tokens_per_second * widths.gpus[key]
    return work | {"learner": tokens / rates.learner.tokens_per_second}


def _scale(config: Config, widths: Widths, num_gpus: int) -> int:
    """Return how many times smaller a run may be that is searched in place of this one."""
    rows = config.prompts.prompts_per_step * config.rollout.samples_per_prompt
    scale = 1
    while (
        rows // (scale * 2) >= ROWS_OF_A_SMALL_RUN
        and config.prompts.prompts_per_step % (scale * 2) == 0
        and num_gpus // (scale * 2) >= 2 * sum(widths.gpus.values())
        and num_gpus // (scale * 2) >= sum(widths.gpus.values()) - 1 + _ranks(config, scale * 2)
    ):
        scale *= 2
    return scale


def _ranks(config: Config, scale: int) -> int:
    """Return the fewest ranks of a run that is so many times smaller."""
    return -(-config.learner.num_workers // scale)


def _scaled(config: Config, rates: Rates, scale: int) -> tuple[Config, Rates, Widths, Demand]:
    """Return a run with a `scale`-th of rows, GPUs and ranks, whose driver has as much to do per second."""
    prompts = msgspec.structs.replace(config.prompts, prompts_per_step=config.prompts.prompts_per_step // scale)
    learner = msgspec.structs.replace(config.learner, num_workers=_ranks(config, scale))
    small = msgspec.structs.replace(config, prompts=prompts, learner=learner)
    slower = msgspec.structs.replace(rates, seconds_per_call=rates.seconds_per_call * scale)
    return small, slower, Widths.of(small), Demand(small, slower)
