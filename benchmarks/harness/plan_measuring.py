"""The workloads of benchmarks/harness/workloads.py on real Ray, for `python -m benchmarks.cases.plan`."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from statistics import mean
from typing import Any

import msgspec
import ray
from ray.actor import ActorHandle

from benchmarks.cases.streaming import SAMPLING, TIMEOUTS, StubRun
from benchmarks.harness.stub_pools import SharedWorker, StubCluster, StubRates
from benchmarks.harness.workloads import PROMPT_TOKENS, Split, Workload
from cluster.actors.cluster import Arguments, Options
from cluster.config.run_config import Config
from cluster.config.sections import StudentConfig
from cluster.config.stages import EngineConfig, TeacherConfig
from cluster.contracts.batches import Span
from cluster.run.driver import Permits
from cluster.run.flow import Flow, StepBatches
from learner.group import LEARNER_ACTOR, LearnerGroup
from rollout_workers.pool import RolloutActorSettings, RolloutPool
from rollout_workers.prompts import PromptSet
from teacher_workers.pool import start_pool
from teacher_workers.router import TeacherRouter

MOST_SPLITS = 7  # that are measured of a workload


@dataclass
class Measured:
    """One split of one workload on real Ray."""

    workload: str
    split: Split
    step_seconds: list[float] = field(default_factory=list)
    records: list[dict[str, float]] = field(default_factory=list)  # what plan reads of metrics.jsonl, for each step
    spans: list[Span] = field(default_factory=list)  # the calls of all steps


class OneProcessPerPool(StubCluster):
    """Makes the workers of pools of one name, of however many runs, in one process."""

    def __init__(self, rates: StubRates, rows_per_batch: int) -> None:
        super().__init__(rates, rows_per_batch)
        self._processes: dict[str, ActorHandle] = {}
        self._numbers = count()

    def create(self, actor_class: str, names: Sequence[str], arguments: Arguments, options: Options) -> list[Any]:
        """Return one handle per name."""
        if actor_class == LEARNER_ACTOR:
            return super().create(actor_class, names, arguments, options)
        pool = names[0].rpartition("-")[0]
        if pool not in self._processes:
            option = {"num_cpus": 0, "max_concurrency": 1000}
            label = f"stubs-{pool}-{time.monotonic_ns()}"
            [self._processes[pool]] = super().create(actor_class, [label], [()], [option])
        return [SharedWorker(self._processes[pool], next(self._numbers)) for _ in names]

    def end(self) -> None:
        """End the processes."""
        for process in self._processes.values():
            ray.kill(process)


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
        cluster = OneProcessPerPool(rates, config.rollout.rows_per_batch)
        stack.callback(cluster.end)
        learner = LearnerGroup(config, [{"num_cpus": 0}], cluster)
        stack.callback(learner.shutdown)
        runs = {}
        for split in measured_splits(workload):
            rollouts = RolloutPool(settings, [{}] * split.rollout, TIMEOUTS, cluster=cluster)
            pools = {
                name: start_pool(name, TeacherConfig("stub"), 1, [{}] * size, TIMEOUTS, cluster)
                for name, size in split.teachers.items()
            }
            rollouts.wait_until_ready()
            for pool in pools.values():
                pool.wait_until_ready()
            rollouts.set_prompts(prompts)
            teachers = TeacherRouter(pools, TIMEOUTS.call_seconds)
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
            asked[admitted] = flow.admit(admitted, run.requests(admitted), SAMPLING, run.config.scorers)
        batches = asked.pop(step)
        learned = run.learner.step(batches, step)
        seconds = time.perf_counter() - started
        if step - steps[0] < settling_steps(max_staleness) or step > steps[-1] - max_staleness:
            continue
        handles = batches.finished
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


def settling_steps(max_staleness: int) -> int:
    """Return the first steps of a series that are not like the later ones, as plan leaves them out."""
    return max_staleness + 1 if max_staleness else 0


def measure(workload: Workload, turns: int) -> list[Measured]:
    """Do the same steps on every split in turns; the first of what is returned is a strictly on-policy probe."""
    splits, max_staleness = measured_splits(workload), workload.max_staleness
    found = {str(split): Measured(workload.name, split) for split in splits}
    probed = splits[len(splits) // 2]
    probe = Measured(workload.name, probed)
    # A workload that runs ahead does its steps in one go, and some before and after them that are not typical.
    series = 1 if not max_staleness else turns + settling_steps(max_staleness) + max_staleness
    with stub_runs(workload) as runs:
        strict = replace(runs[str(probed)], config=strictly(workload.config))
        do_steps(strict, range(1), Measured(workload.name, probed))  # warms up
        for turn in range(turns):
            do_steps(strict, range(1 + turn, 2 + turn), probe)
        for turn in range(turns if series == 1 else 1):
            for name, run in runs.items():
                do_steps(run, range(1 + turn, 1 + turn + series), found[name])
    return [probe, *found.values()]


def strictly(config: Config) -> Config:
    """Return the run strictly on-policy, as rates are read off."""
    return msgspec.structs.replace(config, rollout=msgspec.structs.replace(config.rollout, max_staleness=0))
