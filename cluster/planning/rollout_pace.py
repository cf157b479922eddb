"""How fast rollout workers write, from the calls to them."""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median

import numpy as np

from cluster.contracts.config import Config
from cluster.contracts.observation import Span

ORDERS = 8  # in which sequences may have been begun that are averaged over
LEAST_PACE_SECONDS = 1e-7  # per token: faster than any engine, so that a fit through noise stays above 0


@dataclass(frozen=True)
class Chain:
    """One rollout of one worker: its batches in the order in which they came back."""

    batches: tuple[Span, ...]

    @property
    def num_rows(self) -> int:
        """Return its completions."""
        return sum(span.num_rows for span in self.batches)

    @property
    def seconds(self) -> float:
        """Return how long it took."""
        return self.batches[-1].ended - self.batches[0].began

    @property
    def lengths(self) -> list[int]:
        """Return how long each completion was."""
        return [length for span in self.batches for length in span.lengths]

    def equations(self, rows_per_batch: int) -> list[tuple[float, float, float]]:
        """Return (L, sum of min(length, L), seconds) at moments when a completion of L tokens was finished."""
        lengths = np.array(self.lengths)
        found: list[tuple[float, float, float]] = []
        for index, span in enumerate(self.batches):
            is_last = index == len(self.batches) - 1
            if is_last or span.num_rows >= rows_per_batch:  # others leave when they have waited, not when one is done
                length = max(span.lengths)  # rows finish in the order of their lengths
                found.append((length, float(np.minimum(lengths, length).sum()), span.ended - self.batches[0].began))
        return found


def chains_of(spans: Iterable[Span]) -> list[Chain]:
    """Put the calls of each worker together that belong to one rollout."""
    chains: dict[tuple[str, int | None], list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.began):
        chains[span.worker, span.rollout].append(span)
    return [Chain(tuple(chain)) for chain in chains.values()]


def pace_of(chains: Sequence[Chain], config: Config) -> tuple[tuple[int, float], ...]:
    """Return seconds per token by the number of running sequences: two points, or one where engines were full."""
    most = config.rollout.engine.max_concurrent_sequences
    fitting = [chain for chain in chains if chain.num_rows <= most]
    if not fitting:
        random = np.random.default_rng(0)
        paces = [chain.seconds / makespan(chain.lengths, most, random) for chain in chains]
        return ((most, max(median(paces), LEAST_PACE_SECONDS)),)
    equations = np.array([found for chain in fitting for found in chain.equations(config.rollout.rows_per_batch)])
    alone, per_running = least_squares(equations[:, :2], equations[:, 2])
    largest = max(2, *(chain.num_rows for chain in fitting))
    return (
        (1, max(alone + per_running, LEAST_PACE_SECONDS)),
        (largest, max(alone + per_running * largest, LEAST_PACE_SECONDS)),
    )


def makespan(lengths: Sequence[float], most: int, random: np.random.Generator) -> float:
    """Return the tokens that pass until all sequences are written, `most` at a time, in any order; a mean over orders.

    Example:
        >>> makespan([3, 3, 3, 3], 2, np.random.default_rng(0))
        6.0
    """
    ends = []
    for _ in range(ORDERS):
        free_at = [0.0] * most
        for length in random.permutation(np.array(lengths, float)):
            heapq.heapreplace(free_at, free_at[0] + float(length))
        ends.append(max(free_at))
    return mean(ends)


def busy_times(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """Return the times in which one worker had a call to answer."""
    times: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda span: span.began):
        if times and span.began <= times[-1][1]:
            times[-1] = (times[-1][0], max(times[-1][1], span.ended))
        else:
            times.append((span.began, span.ended))
    return times


def least_squares(factors: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Return the two coefficients, of which none is negative, that fit the relative differences best."""
    weights = 1 / np.maximum(values, 1e-9)
    weighted, ones = factors * weights[:, None], np.ones(len(values))
    both = np.linalg.lstsq(weighted, ones, rcond=None)[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    alone = [float(column @ ones / max(column @ column, 1e-300)) for column in weighted.T]
    errors = [float(((column * one - ones) ** 2).sum()) for column, one in zip(weighted.T, alone, strict=True)]
    return (alone[0], 0.0) if errors[0] <= errors[1] else (0.0, alone[1])
