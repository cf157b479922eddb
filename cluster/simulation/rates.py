"""Reads how fast each stage is: from a JSON file for `preceptor plan`; measured_rates.py reads a finished run."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, field

from cluster.config.fields import Count, Fraction, NonNegative, Positive, Section
from cluster.config.run_config import Config
from cluster.contracts.errors import ConfigError
from cluster.contracts.files import read_text

MAX_RATES_BYTES = 1 << 24
STANDARD_NORMAL = NormalDist()
SMALLEST_PART = 1e-12  # of the lengths; at 0 the normal distribution has no value
Lengths = Annotated[tuple[Positive, ...], Meta(min_length=1, max_length=100_000)]


class LogNormal(Section, frozen=True):
    """Describes lengths whose logarithms are normally distributed, cut off at the longest."""

    median: Positive
    sigma: NonNegative
    longest: Count


class RolloutRates(Section, frozen=True):
    """Describes one rollout worker.

    `seconds_per_token` are points [sequences that run together, seconds in which each of them gets a token], with the
    number of sequences rising. Between two points it is on the line through them, beyond the last one on the line
    through the last two; one point holds for any number.
    """

    seconds_per_token: Annotated[tuple[tuple[Count, Positive], ...], Meta(min_length=1)]
    prompt_tokens: Lengths  # quantiles at equal distances, from the shortest to the longest; one value: all alike
    completion_tokens: Lengths | LogNormal  # the same

    def __post_init__(self) -> None:
        running = [point[0] for point in self.seconds_per_token]
        if any(first >= second for first, second in pairwise(running)):
            raise ValueError(f"seconds_per_token: numbers of sequences must rise, found {running}")
        for name, quantiles in (("prompt_tokens", self.prompt_tokens), ("completion_tokens", self.completion_tokens)):
            if not isinstance(quantiles, LogNormal) and any(a > b for a, b in pairwise(quantiles)):
                raise ValueError(f"{name}: quantiles must not fall")


class TeacherRates(Section, frozen=True):
    """Describes one replica of a teacher."""

    tokens_per_second: Positive  # prompt and completion
    seconds_per_pass: NonNegative = 0.0  # of the batches that it reads together, however few tokens they have
    share: Fraction = 1.0  # of the trajectories, of those whose prompts name it first


class LearnerRates(Section, frozen=True):
    """Describes one rank of the learner."""

    tokens_per_second: Positive  # prompt and completion, forward and backward
    seconds_per_micro_batch: NonNegative = 0.0
    optimizer_seconds: NonNegative = 0.0  # of the update itself, once per step


class Rates(Section, frozen=True):
    """Describes all stages of a run on its hardware."""

    rollout: RolloutRates
    teachers: Annotated[dict[str, TeacherRates], Meta(min_length=1)]
    learner: LearnerRates
    sync_seconds: NonNegative = 0.0  # of bringing new weights to all rollout workers, which write nothing meanwhile
    seconds_per_call: NonNegative = 0.0005  # of the driver's own time, for each call to a worker
    source: str = field(default="")  # where they are from


def read_rates(path: Path, config: Config) -> Rates:
    """Read a rates file; raise ConfigError if it is missing, malformed, or lacks a teacher of the run."""
    text = read_text(path, "rates file", ConfigError, MAX_RATES_BYTES)
    try:
        rates = msgspec.json.decode(text, type=Rates)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a rates file: {error}") from error
    check_rates(rates, config, str(path))
    return rates


def check_rates(rates: Rates, config: Config, source: str) -> None:
    """Raise ConfigError if a teacher of the run has no rates, or all have a share of 0."""
    missing = [name for name in config.teachers if name not in rates.teachers]
    if missing:
        raise ConfigError(
            f"{source}: teachers has no rates of {missing[0]!r}, which the run names; it has {sorted(rates.teachers)}"
        )
    if not any(rates.teachers[name].share for name in config.routes):
        raise ConfigError(f"{source}: teachers: share is 0 for all of {config.routes}; set the shares of trajectories")


def seconds_per_token(points: Sequence[tuple[int, float]], running: int) -> float:
    """Return the seconds per token of each of so many sequences.

    Example:
        >>> [seconds_per_token([(1, 2.0), (3, 4.0)], running) for running in (1, 2, 5)]
        [2.0, 3.0, 6.0]
    """
    if running <= points[0][0] or len(points) == 1:
        return points[0][1]
    upper = min(bisect_left([point[0] for point in points], running), len(points) - 1)
    (left, low), (right, high) = points[upper - 1], points[upper]
    return max(low + (high - low) * (running - left) / (right - left), 1e-12)


def sample_lengths(lengths: Sequence[float] | LogNormal, num: int, random: np.random.Generator) -> list[int]:
    """Return so many lengths, of at least 1 token, in any order: one from each of as many equal parts of them all.

    Their mean is then nearly that of the distribution, where as many independent ones would miss it by percents.
    """
    parts = random.permutation((np.arange(num) + random.random(num)) / num)
    if isinstance(lengths, LogNormal):
        deviations = np.array([STANDARD_NORMAL.inv_cdf(part) for part in np.clip(parts, SMALLEST_PART, None)])
        return [
            int(length) for length in np.clip(lengths.median * np.exp(lengths.sigma * deviations), 1, lengths.longest)
        ]
    at = parts * (len(lengths) - 1)
    return [max(1, round(length)) for length in np.interp(at, np.arange(len(lengths)), lengths)]
