"""What `preceptor plan` predicts, against stub engines on real Ray: `python -m benchmarks.plan`.

For each workload of benchmarks/workloads.py, splits of its replicas are measured in turns, and predicted twice: from
the stubs' true rates, and from rates that are read off the calls of one of these splits, as plan reads those of a run
that is over. Bar: the predicted step time is within 10 % of the measured one.

`--measure FILE` measures only (workloads may be named, so that it can be done in parts), `--from FILE ...` reads that.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from itertools import count
from pathlib import Path
from statistics import mean, median
from typing import Any

import msgspec
import ray

from benchmarks.report import RESULTS, Row, at_most, print_rows, row, write_rows
from benchmarks.streaming import SAMPLING, TIMEOUTS, StubRun
from benchmarks.stub_pools import SharedWorker, StubLearnerActor, StubRolloutProcess, StubTeacherProcess
from benchmarks.workloads import PROMPT_TOKENS, WORKLOADS, Split, Workload
from cluster.actors import create_actors
from cluster.contracts.config import Config, EngineConfig, StudentConfig, TeacherConfig
from cluster.contracts.observation import Span
from cluster.flow import Flow, StepBatches
from cluster.local_cluster import local_cluster
from cluster.permits import Permits
from cluster.planning.demand import Demand
from cluster.planning.measured_rates import FIRST_STEP, RunStep, rates_from
from cluster.planning.rates import LearnerRates, LogNormal, Rates, RolloutRates, TeacherRates
from cluster.planning.simulated_run import Split as Workers
from cluster.planning.simulated_run import simulate
from learner.group import LearnerGroup
from rollout_workers.actor import RolloutActorSettings
from rollout_workers.pool import RolloutPool
from rollout_workers.prompts import PromptSet
from teacher_workers.pool import start_pool
from teacher_workers.pools import TeacherPools

MOST_SPLITS = 7  # that are measured of a workload; the others are predicted only
MOST_OFF = 1.1
SIMULATED_STEPS = 24
SERIES = 2  # times as many steps of a workload that runs ahead, in one go: its first and last are left out


@dataclass
class Measured:
    """One split of one workload on real Ray."""

    workload: str
    split: Split
    step_seconds: list[float] = field(default_factory=list)
    records: list[dict[str, float]] = field(default_factory=list)  # what plan reads of metrics.jsonl, for each step
    spans: list[Span] = field(default_factory=list)  # the calls of all steps


class OneProcess:
    """Makes the workers of any number of pools in one process."""

    def __init__(self, cls: type, *arguments: Any) -> None:
        option = {"num_cpus": 0, "max_concurrency": 1000}
        [self._process] = create_actors(cls, [f"stubs-{cls.__name__}-{time.monotonic_ns()}"], [arguments], [option])
        self._numbers = count()

    def create(self, _cls: type, names: Sequence[str], _arguments: Any, _options: Any) -> list[Any]:
        """Return one handle per name."""
        return [SharedWorker(self._process, next(self._numbers)) for _ in names]

    def end(self) -> None:
        """End the process."""
        ray.kill(self._process)


def measured_splits(workload: Workload) -> list[Split]:
    """Return the splits to measure: all, or where there are many, every so many of them."""
    every = -(-len(workload.splits) // MOST_SPLITS)
    return workload.splits[::every]


@contextmanager
def stub_runs(workload: Workload) -> Iterator[dict[str, StubRun]]:
    """Start the pools of every split, over the same processes."""
    config, rates = workload.config, workload.rates
    prompts = PromptSet.join([PromptSet.of_token_ids([[1] * PROMPT_TOKENS], teacher) for teacher in workload.routes])
    settings = RolloutActorSettings(StudentConfig("stub"), EngineConfig(), 1, config.rollout.rows_per_batch, None)
    with ExitStack() as stack:
        writers = OneProcess(StubRolloutProcess, rates, config.rollout.rows_per_batch)
        readers = {name: OneProcess(StubTeacherProcess, rates) for name in workload.teachers}
        for process in (writers, *readers.values()):
            stack.callback(process.end)
        learner = LearnerGroup(
            config,
            [{"num_cpus": 0}],
            create=lambda _cls, names, _arguments, options: create_actors(StubLearnerActor, names, [(rates,)], options),
        )
        stack.callback(learner.shutdown)
        runs = {}
        for split in measured_splits(workload):
            rollouts = RolloutPool(settings, [{}] * split.rollout, TIMEOUTS, create=writers.create)
            pools = {
                name: start_pool(name, TeacherConfig("stub"), 1, [{}] * size, TIMEOUTS, create=readers[name].create)
                for name, size in split.teachers.items()
            }
            rollouts.wait_until_ready()
            for pool in pools.values():
                pool.wait_until_ready()
            rollouts.set_prompts(prompts)
            teachers = TeacherPools(pools, TIMEOUTS.call_seconds)
            runs[str(split)] = StubRun(config, rollouts, teachers, learner, workload.rows_per_step)
        yield runs


def do_steps(run: StubRun, steps: range, measured: Measured) -> None:
    """Do steps as the driver does, and note those that are like the ones of a long run."""
    max_staleness = run.config.rollout.max_staleness
    flow = Flow(run.rollouts, run.teachers, TIMEOUTS.call_seconds)
    permits = Permits(steps[0], steps[-1] + 1, max_staleness)
    asked: dict[int, StepBatches] = {}
    for step in steps:
        started = time.perf_counter()
        for admitted in permits.admit(step):
            asked[admitted] = flow.admit(admitted, run.requests(admitted), SAMPLING, "exact", run.config.scorers)
        batches = asked.pop(step)
        learned = run.learner.step(batches, step)
        seconds = time.perf_counter() - started
        if max_staleness and step in (steps[0], steps[-1]):
            continue
        handles = batches.progress.finished
        lengths = [length for handle in handles for length in handle.num_completion_tokens]
        tokens = sum(sum(handle.num_tokens) for handle in handles)
        measured.step_seconds.append(seconds)
        measured.spans += [span for handle in handles for span in handle.spans]
        measured.records.append(
            {
                "step": step + 1,
                "tokens": tokens,
                "completion_tokens": sum(lengths),
                "rollout/completion_length": mean(lengths),
                "rollout/completion_length_max": max(lengths),
                "learn/tokens_per_second": tokens / learned["busy_seconds"].value,
                "sync/seconds": 0.0,
            }
        )


def measure(workload: Workload, turns: int) -> list[Measured]:
    """Do the same steps on every split in turns."""
    found = {str(split): Measured(workload.name, split) for split in measured_splits(workload)}
    with stub_runs(workload) as runs:
        warmed = measured_splits(workload)[len(runs) // 2]
        do_steps(runs[str(warmed)], range(1), Measured(workload.name, warmed))
        series = SERIES * turns if workload.max_staleness else 1
        for turn in range(turns // series or 1):
            for name, run in runs.items():
                first = 1 + turn * series
                do_steps(run, range(first, first + series), found[name])
    return list(found.values())


def parse(measured: Sequence[Mapping[str, Any]], name: str) -> list[Measured]:
    """Return what was measured of one workload, from its JSON values."""
    return [
        Measured(
            name, Split(**one["split"]), one["step_seconds"], one["records"], [Span(**span) for span in one["spans"]]
        )
        for one in measured
        if one["workload"] == name
    ]


def compare(workload: Workload, measured: Sequence[Measured]) -> list[Row]:
    """Return the predicted over the measured step time of every split, and what the plan's choice costs."""
    if not measured:
        return []
    from_run = rates_of_measured(workload, measured[len(measured) // 2])
    rows = []
    predicted: dict[str, float] = {}
    for one in measured:
        size = f"{workload.name}: {one.split}"
        seconds = typical(workload, one.step_seconds)
        predicted[str(one.split)] = predict(workload, true_rates(workload), one.split)
        from_measured = predict(workload, from_run, one.split)
        rows += [
            row("step, measured", size, seconds, "s"),
            within(row("predicted / measured step", size, predicted[str(one.split)] / seconds, "ratio")),
            within(row("the same, rates read off a run", size, from_measured / seconds, "ratio")),
        ]
    found = {str(one.split): typical(workload, one.step_seconds) for one in measured}
    best, chosen = min(found, key=found.__getitem__), min(predicted, key=predicted.__getitem__)
    size = f"{workload.name}: plan {chosen}, measured best {best}"
    return [
        *rows,
        at_most(
            row("plan's split / best measured split, measured step", size, found[chosen] / found[best], "ratio"),
            MOST_OFF,
        ),
    ]


def typical(workload: Workload, seconds: Sequence[float]) -> float:
    """Return a step's seconds: the median, or the mean where steps lend each other time."""
    return mean(seconds) if workload.max_staleness else median(seconds)


def within(found: Row) -> Row:
    """Add the bar of a ratio that should be 1."""
    return {**found, "bar": f"{1 / MOST_OFF:.2f} to {MOST_OFF:.2f}", "met": 1 / MOST_OFF <= found["value"] <= MOST_OFF}


def predict(workload: Workload, rates: Rates, split: Split) -> float:
    """Return a step's seconds in simulated time."""
    config = one_batch_at_a_time(workload.config)
    demand = Demand(config, rates, num_prompts=workload.rows_per_step)
    found = simulate(config, rates, Workers(split.rollout, split.teachers, 1), demand, SIMULATED_STEPS)
    return typical(workload, found.step_seconds)


def true_rates(workload: Workload) -> Rates:
    """Return what the stubs are made to do."""
    stub, rows = workload.rates, sum(workload.teachers.values())
    points = tuple(
        (running, stub.seconds_per_token + running * stub.seconds_per_running)
        for running in (1, stub.concurrent_sequences)
    )
    return Rates(
        rollout=RolloutRates(points, (PROMPT_TOKENS,), LogNormal(stub.median_length, stub.sigma, stub.longest)),
        teachers={
            name: TeacherRates(stub.score_tokens_per_second, share=share / rows)
            for name, share in workload.teachers.items()
        },
        learner=LearnerRates(stub.learn_tokens_per_second),
    )


def rates_of_measured(workload: Workload, measured: Measured) -> Rates:
    """Read rates off a measured split, as `preceptor plan` does off a run's directory."""
    steps = [msgspec.convert({**record, "step": FIRST_STEP}, RunStep) for record in measured.records]
    return rates_from(workload.config, steps, measured.spans, str(measured.split))


def one_batch_at_a_time(config: Config) -> Config:
    """Return the run with teachers that read as the stubs do."""
    teachers = {
        name: msgspec.structs.replace(teacher, engine=msgspec.structs.replace(teacher.engine, max_batched_tokens=1))
        for name, teacher in config.teachers.items()
    }
    return msgspec.structs.replace(config, teachers=teachers)


def main() -> None:
    """Measure, predict, print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=[], help="beginnings of names; default: all")
    parser.add_argument("--turns", type=int, default=4, help="measured steps, or series of steps, of each split")
    parser.add_argument("--measure", type=Path, help="measure only, and write what was found there")
    parser.add_argument("--from", dest="sources", type=Path, nargs="+", help="what --measure wrote")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/DATE-plan.json")
    options = parser.parse_args()
    if options.sources:
        measured = [one for source in options.sources for one in json.loads(source.read_text())]
    else:
        chosen = [one for one in WORKLOADS if not options.workloads or one.name.startswith(tuple(options.workloads))]
        measured = []
        with local_cluster(num_cpus=4, include_dashboard=False, log_to_driver=False):
            for workload in chosen:
                measured += [asdict(one) for one in measure(workload, options.turns)]
                print(f"measured: {workload.name}", flush=True)
                if options.measure:
                    options.measure.write_text(json.dumps(measured))
    if options.measure:
        return
    rows = [found for workload in WORKLOADS for found in compare(workload, parse(measured, workload.name))]
    print_rows(rows)
    output = options.output or RESULTS / f"{date.today():%Y-%m-%d}-plan.json"
    write_rows(output, "python -m benchmarks.plan", rows)
    print(f"written: {output}")


if __name__ == "__main__":
    main()
