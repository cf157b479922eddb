"""Reads the rates of every stage off a finished run: from its metrics and from the calls in its trace.

- Rollout. A sequence of L tokens that began with all others of its call is finished after
  a L + b sum_i min(length_i, L) seconds, where each token takes a + b n seconds while n sequences run: batches that
  left full, and the last ones, give one such equation each, solved by least squares. Where a worker had more sequences
  than it runs at a time, one rate is fitted; so measure with few sequences per worker, strictly on-policy.
- Teachers. A replica that has m batches with t tokens in all, one after the other, is busy for c m + t / rate seconds.
- Learner, sync: medians over steps, of which those before the third are start-up; the update itself is a rank's last
  call before each weight sync.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import TypeVar, cast

import msgspec
import numpy as np

from cluster.config.fields import CountOrZero, NonNegative, Positive
from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.batches import Span, Stage
from cluster.contracts.errors import ConfigError
from cluster.contracts.files import read_text
from cluster.simulation.rates import LearnerRates, Rates, RolloutRates, TeacherRates

ORDERS = 8  # in which sequences may have been begun that are averaged over
LEAST_TOKEN_SECONDS = 1e-7  # faster than any engine, so that a fit through noise stays above 0


@dataclass(frozen=True)
class WorkerRollout:
    """Holds one rollout of one worker: its batches in the order in which they came back."""

    batches: tuple[Span, ...]

    @property
    def num_rows(self) -> int:
        return sum(span.num_rows for span in self.batches)

    @property
    def seconds(self) -> float:
        return self.batches[-1].ended - self.batches[0].began

    @property
    def lengths(self) -> list[int]:
        return [length for span in self.batches for length in span.lengths]

    def equations(self, rows_per_batch: int) -> list[tuple[float, float, float]]:
        """Return (L, sum of min(length, L), seconds) at moments when a completion of L tokens was finished."""
        lengths = np.array(self.lengths)
        equations: list[tuple[float, float, float]] = []
        for index, span in enumerate(self.batches):
            is_last = index == len(self.batches) - 1
            if is_last or span.num_rows >= rows_per_batch:  # others leave when they have waited, not when one is done
                length = max(span.lengths)  # rows finish in the order of their lengths
                equations.append((length, float(np.minimum(lengths, length).sum()), span.ended - self.batches[0].began))
        return equations


def rollouts_of(spans: Iterable[Span]) -> list[WorkerRollout]:
    """Put the calls of each worker together that belong to one rollout."""
    rollouts: dict[tuple[str, int | None], list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.began):
        rollouts[span.worker, span.rollout].append(span)
    return [WorkerRollout(tuple(batches)) for batches in rollouts.values()]


def decode_rate(rollouts: Sequence[WorkerRollout], config: Config) -> tuple[tuple[int, float], ...]:
    """Return seconds per token by the number of running sequences: two points, or one where engines were full."""
    most = config.rollout.engine.concurrent_sequences
    fitting = [rollout for rollout in rollouts if rollout.num_rows <= most]
    if not fitting:
        random = np.random.default_rng(0)
        seconds = [rollout.seconds / makespan(rollout.lengths, most, random) for rollout in rollouts]
        return ((most, max(median(seconds), LEAST_TOKEN_SECONDS)),)
    equations = np.array(
        [equation for rollout in fitting for equation in rollout.equations(config.rollout.rows_per_batch)]
    )
    alone, per_running = least_squares(equations[:, :2], equations[:, 2])
    largest = max(2, *(rollout.num_rows for rollout in fitting))
    return (
        (1, max(alone + per_running, LEAST_TOKEN_SECONDS)),
        (largest, max(alone + per_running * largest, LEAST_TOKEN_SECONDS)),
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


FIRST_STEP = 3  # those before it compile and fill caches
MOST_QUANTILES = 201
MAX_FILE_BYTES = 1 << 30
_Decoded = TypeVar("_Decoded")


class RunStep(msgspec.Struct, frozen=True, kw_only=True):
    """Holds what is read of a step's line in metrics.jsonl."""

    step: int
    tokens: Positive
    completion_tokens: Positive
    completion_length: Positive = msgspec.field(name="rollout/completion_length")
    completion_length_max: Positive = msgspec.field(name="rollout/completion_length_max")
    learned_tokens_per_second: Positive = msgspec.field(name="learn/tokens_per_second")
    sync_seconds: NonNegative = msgspec.field(name="sync/seconds")


class _Arguments(msgspec.Struct, frozen=True):
    """Holds what an entry of a trace file says besides its time; as in `Span`."""

    name: str = ""  # of a worker
    rows: CountOrZero = 0
    tokens: CountOrZero = 0
    rollout: int | None = None
    lengths: tuple[CountOrZero, ...] = ()  # of completions
    pool: str = ""  # where the worker's name does not say it


class _Event(msgspec.Struct, frozen=True):
    """Holds one entry of a trace file: a call to a worker, or a worker's name."""

    ph: str
    name: str
    pid: int
    ts: NonNegative = 0.0  # microseconds
    dur: NonNegative = 0.0
    args: _Arguments = _Arguments()


class _Trace(msgspec.Struct, frozen=True):
    events: list[_Event] = msgspec.field(name="traceEvents")


def rates_of_run(path: Path) -> Rates:
    """Return the rates of a run, from its directory; raise ConfigError if a file is missing or damaged."""
    directory = RunDirectory.open(path)
    config = directory.read_config()
    lines = read_text(directory.metrics, "run's metrics", ConfigError, MAX_FILE_BYTES).splitlines()
    trace = _decode(directory.trace, read_text(directory.trace, "run's trace", ConfigError, MAX_FILE_BYTES), _Trace)
    steps = [_decode(directory.metrics, line, RunStep) for line in lines if line]
    return rates_from(config, steps, _spans_of(trace.events), str(path))


def rates_from(config: Config, steps: Sequence[RunStep], spans: Sequence[Span], source: str) -> Rates:
    """Return rates from a run's steps and the calls of some; raise ConfigError where these do not show them."""
    if config.rollout.max_staleness:
        raise ConfigError(
            f"{source}: rates cannot be told apart where steps overlap, and the run's rollout.max_staleness is "
            f"{config.rollout.max_staleness}; read them off a run with 0, and plan with any other"
        )
    shared = [names for names in config.scorer_groups.values() if len(names) > 1]
    if shared:
        raise ConfigError(
            f"{source}: rates cannot be told apart where teachers wait for their turns, and {' and '.join(shared[0])} "
            "share a slot; read them off a run with slots of their own"
        )
    later = [step for step in steps if step.step >= FIRST_STEP]
    of_batches = [span for span in spans if span.num_rows and span.num_tokens]
    rollouts = rollouts_of([span for span in of_batches if span.stage == "generate" and span.lengths])
    if not later or not rollouts:
        raise ConfigError(
            f"{source}: {len(steps)} steps and {len(rollouts)} traced rollouts are too few to read rates off; "
            f"run {FIRST_STEP} steps or more, with logging.trace_steps above 0"
        )
    num_completions = sum(step.completion_tokens / step.completion_length for step in later)
    prompt_tokens = sum(step.tokens - step.completion_tokens for step in later) / num_completions
    rollout = RolloutRates(
        seconds_per_token=decode_rate(rollouts, config),
        prompt_tokens=(max(1.0, prompt_tokens),),
        completion_tokens=_quantiles(rollouts, max(step.completion_length_max for step in later)),
    )
    return Rates(
        rollout=rollout,
        teachers=_teachers(of_batches, config, source),
        learner=_learner(later, spans, config.learner.num_workers),
        sync_seconds=median(step.sync_seconds for step in later),
        source=source,
    )


def _teachers(spans: Sequence[Span], config: Config, source: str) -> dict[str, TeacherRates]:
    rows = {name: 0 for name in config.teachers}
    rates: dict[str, TeacherRates] = {}
    for name in config.teachers:
        own = [span for span in spans if span.pool == f"teacher-{name}" and span.stage == "score" and span.seconds > 0]
        if not own:
            raise ConfigError(f"{source}: the trace has no batch that teacher {name!r} scored; run more steps")
        rows[name] = sum(span.num_rows for span in own)
        rates[name] = _teacher(own)
    total = sum(rows[name] for name in config.routes)
    return {
        name: msgspec.structs.replace(measured, share=min(1.0, rows[name] / total)) for name, measured in rates.items()
    }


def _teacher(spans: Sequence[Span]) -> TeacherRates:
    """Fit what a batch and a token take to the times in which replicas were busy without a break."""
    by_worker: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_worker[span.worker].append(span)
    rows, seconds = [], []
    for own in by_worker.values():
        for began, ended in busy_times(own):
            inside = [span for span in own if began <= span.began and span.ended <= ended]
            rows.append((len(inside), sum(span.num_tokens for span in inside)))
            seconds.append(ended - began)
    per_batch, per_token = least_squares(np.array(rows, float), np.array(seconds))
    if per_token <= 0:
        per_batch, per_token = 0.0, sum(seconds) / sum(tokens for _, tokens in rows)
    return TeacherRates(tokens_per_second=1 / per_token, seconds_per_pass=per_batch)


def _learner(steps: Sequence[RunStep], spans: Sequence[Span], num_ranks: int) -> LearnerRates:
    """Tell the update itself from forward and backward: it is a rank's last call before each weight sync."""
    own = sorted((span for span in spans if span.worker == "learner-0"), key=lambda span: span.began)
    updates = [before.seconds for before, after in pairwise(own) if (before.stage, after.stage) == ("learn", "sync")]
    optimizer = median(updates) if updates else 0.0
    rates = []
    for step in steps:
        busy = step.tokens / step.learned_tokens_per_second
        rates.append(step.tokens / max(busy - optimizer, busy / 10) / num_ranks)
    return LearnerRates(median(rates), optimizer_seconds=optimizer)


def _quantiles(rollouts: Sequence[WorkerRollout], longest: float) -> tuple[float, ...]:
    lengths = sorted(length for rollout in rollouts for length in rollout.lengths)
    num = min(MOST_QUANTILES, len(lengths))
    quantiles = [max(1.0, float(value)) for value in np.quantile(lengths, np.linspace(0, 1, num))]
    return (*quantiles[:-1], max(quantiles[-1], longest))


def _spans_of(events: Sequence[_Event]) -> list[Span]:
    workers = {event.pid: event.args.name for event in events if event.name == "process_name"}
    spans = []
    for event in (event for event in events if event.ph == "X"):
        said, worker, stage = event.args, workers.get(event.pid, ""), cast(Stage, event.name)
        pool, began, ended = said.pool or worker.rpartition("-")[0], event.ts / 1e6, (event.ts + event.dur) / 1e6
        spans.append(Span(pool, worker, stage, began, ended, said.rows, said.tokens, said.rollout, said.lengths))
    return spans


def _decode(path: Path, text: str, kind: type[_Decoded]) -> _Decoded:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not what a run writes: {error}; plan from another run") from error
