"""Measures every stage of the loop alone and all together: `python -m benchmarks.cases.stages --pair PAIR`.

Each step is done twice. "Alone": generate everything, then score it, then learn from it, then sync the weights, with
what the pools' processes compute in each. "Together": the step as the training loop does it, strictly on-policy. Rates
count completion tokens.

The pools share this machine's cores, so the loop can at best keep all cores busy with nothing but what the stages need.
Its ratio to that is the CPU-seconds of all stages alone over cores x seconds of the step together, both per completion
token. What the driver and Ray compute is no stage's and counts against the loop. Where cores are hardware threads of
the same core, all work takes longer as soon as both are busy, and the ratio cannot reach 1: the last row says how much.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import ray
from psutil import Process

from benchmarks.harness.contention import slowdown
from benchmarks.harness.model_pairs import PAIRS, missing_models, pair_config
from benchmarks.harness.process_trees import cpu_seconds, descendants, spent
from benchmarks.harness.report import RESULTS, Row, at_least, print_rows, row, write_rows
from cluster.config.run_config import Config
from cluster.contracts.batches import BatchHandle, ReadyBatches
from cluster.contracts.files import Record
from cluster.contracts.requests import RolloutRequest
from cluster.nodes.ray_session import ray_session
from cluster.placement.placement import cluster_nodes, plan_placement
from cluster.run.driver import Permits
from cluster.run.flow import Flow, StepBatches
from cluster.run.inputs import Inputs, load_inputs, train_requests, train_sampling
from cluster.run.pools import Pipeline, start_pipeline
from cluster.run.step_metrics import Stopwatch, step_record
from cluster.weight_sync.manifest import WeightSyncReport

BAR = 0.85
STEPS = {"embedded": 20, "smollm2": 2}
WARM_UP_STEPS = {"embedded": 3, "smollm2": 1}
STAGES = ("generate", "score", "learn", "sync")
ACTORS = {"generate": "ray::RolloutActor", "score": "ray::TeacherActor", "learn": "ray::LearnerActor"}
DRIVER_AND_RAY = "driver and Ray"


@dataclass(frozen=True)
class Spent:
    """What a piece of work took."""

    seconds: float
    cpu_seconds: dict[str, float]  # by pool, and of the driver and Ray

    @property
    def of_pools(self) -> float:
        """Return the CPU-seconds of all pools."""
        return sum(seconds for pool, seconds in self.cpu_seconds.items() if pool != DRIVER_AND_RAY)


@dataclass(frozen=True)
class Alone:
    """One step, stage after stage."""

    completion_tokens: int
    stages: dict[str, Spent]  # by stage
    generated_bytes: int
    scored_bytes: int


@dataclass(frozen=True)
class Together:
    """The same step as the loop does it."""

    completion_tokens: int
    spent: Spent
    record: Record


class Meter:
    """Reads what the processes of this run have computed, by pool."""

    def __init__(self) -> None:
        """Find the processes; the pools must be running."""
        self._groups = group_processes(descendants(os.getpid()))

    def measure(self, work: Callable[[], object]) -> Spent:
        """Do some work and return what it took."""
        before, started = self._read(), time.perf_counter()
        work()
        seconds, after = time.perf_counter() - started, self._read()
        return Spent(seconds, {pool: spent(before[pool], after[pool]) for pool in after})

    def _read(self) -> dict[str, dict[int, float]]:
        return {pool: cpu_seconds(processes) for pool, processes in self._groups.items()}


def group_processes(processes: Iterable[Process]) -> dict[str, list[Process]]:
    """Tell by the titles that Ray gives its actors which process is which pool's; engines belong to their actors."""
    groups: dict[str, list[Process]] = {pool: [] for pool in (*ACTORS, DRIVER_AND_RAY)}
    others = {process.pid: process for process in processes}
    for process in list(others.values()):
        title = " ".join(process.cmdline())
        for pool, actor in ACTORS.items():
            if title.startswith(actor):
                groups[pool] += [others.pop(found.pid) for found in descendants(process.pid) if found.pid in others]
    groups[DRIVER_AND_RAY] = list(others.values())
    return groups


class Bench:
    """Running pools, asked for the same steps in two ways."""

    def __init__(self, config: Config, inputs: Inputs, pipeline: Pipeline) -> None:
        self._config, self._inputs = config, inputs
        self._rollouts, self._teachers, self._learner = pipeline.rollouts, pipeline.teachers, pipeline.learner
        self._sampling = train_sampling(config)
        self._flow = Flow(self._rollouts, self._teachers, config.ray.call_timeout_seconds)
        self._policy_version = -1
        self._meter = Meter()
        self._publish()

    def alone(self, step: int) -> Alone:
        """Generate, then score, then learn, then sync."""
        requests, spent = self._requests(step), {}
        generated: list[BatchHandle] = []
        scored: list[BatchHandle] = []
        spent["generate"] = self._meter.measure(
            lambda: generated.extend(self._rollouts.generate(requests, self._sampling))
        )
        spent["score"] = self._meter.measure(
            lambda: scored.extend(self._teachers.score(generated, self._config.scorers))
        )
        spent["learn"] = self._meter.measure(lambda: self._learner.step(ReadyBatches(scored), step))
        spent["sync"] = self._meter.measure(self._publish)
        return Alone(_completion_tokens(scored), spent, _wire_bytes(generated), _wire_bytes(scored))

    def both(self, step: int) -> tuple[Alone, Together]:
        """Do the step both ways, in changing order: whichever is second finds its prompts in the teachers' caches."""
        if step % 2:
            return self.alone(step), self.together(step)
        together = self.together(step)
        return self.alone(step), together

    def together(self, step: int) -> Together:
        """Do the step as the training loop does, strictly on-policy."""
        return self.running(range(step, step + 1))[0]

    def running(self, steps: range, max_staleness: int = 0) -> list[Together]:
        """Do steps as the training loop does."""
        permits, asked = Permits(steps.start, steps.stop, max_staleness), {}
        found = []
        for step in steps:
            records: list[Record] = []

            def work(step: int = step, records: list[Record] = records) -> None:
                for admitted in permits.admit(step):
                    asked[admitted] = self._admit(admitted)
                records.append(self._learn(step, asked.pop(step)))

            took = self._meter.measure(work)
            found.append(Together(int(records[0]["completion_tokens"]), took, records[0]))
        return found

    def _admit(self, step: int) -> StepBatches:
        return self._flow.admit(step, self._requests(step), self._sampling, self._config.scorers)

    def _learn(self, step: int, batches: StepBatches) -> Record:
        watch = Stopwatch()
        with watch.measure("step"):
            learned = self._learner.step(batches, step)
            with watch.measure("sync"):
                synced = self._publish()
        return step_record(step + 1, batches, learned, synced, watch)

    def _requests(self, step: int) -> list[RolloutRequest]:
        return train_requests(self._config, self._inputs, step)

    def _publish(self) -> WeightSyncReport:
        self._policy_version += 1
        return self._learner.publish_weights(self._rollouts.actors, self._policy_version)


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.stages", description=__doc__)
    parser.add_argument("--pair", choices=PAIRS, required=True)
    parser.add_argument("--steps", type=int, help=f"measured steps; default: {STEPS}")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DATE-stages-PAIR.json")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args()
    pair: str = options.pair
    if lacking := missing_models(pair):
        raise SystemExit(lacking)
    config = pair_config(pair, options.overrides)
    # Pools import for themselves: what is forked from a preloaded process is no descendant of its actor's.
    alone, together = measure(config, WARM_UP_STEPS[pair], options.steps or STEPS[pair])
    cores = len(os.sched_getaffinity(0))
    rows = [
        *stage_rows(alone, together, cores, f"{pair} pair, {len(alone)} steps"),
        row("machine: one process alone / beside others, speed", f"{cores} cores", slowdown(cores), "ratio"),
    ]
    print_rows(rows)
    command = " ".join(["python -m benchmarks.cases.stages --pair", pair, *options.overrides])
    write_rows(options.output or RESULTS / f"{date.today():%Y-%m-%d}-stages-{pair}.json", command, rows)


def measure(config: Config, warm_up: int, steps: int) -> tuple[list[Alone], list[Together]]:
    """Do every step both ways, in changing order, so that what the student learns meets both alike."""
    inputs = load_inputs(config)
    with ray_session(config), start_pipeline(config, inputs, plan_placement(config, cluster_nodes())) as pipeline:
        bench = Bench(config, inputs, pipeline)
        done = [bench.both(step) for step in range(warm_up + steps)][warm_up:]
    return [alone for alone, _ in done], [together for _, together in done]


def stage_rows(alone: Sequence[Alone], together: Sequence[Together], cores: int, size: str) -> list[Row]:
    """Return the table: the stages alone, the loop, and the one against the other."""
    return [
        *_alone_rows(alone, size),
        *_together_rows(together, cores, size),
        *_loop_rows(alone, together, cores, size),
    ]


def _alone_rows(alone: Sequence[Alone], size: str) -> list[Row]:
    def rate(stage: str) -> float:
        return statistics.median(step.completion_tokens / step.stages[stage].seconds for step in alone)

    tokens = sum(step.completion_tokens for step in alone)
    cost = {stage: sum(step.stages[stage].of_pools for step in alone) / tokens for stage in STAGES}
    sync_seconds = statistics.median(step.stages["sync"].seconds for step in alone)
    return [
        *(row(f"alone: {stage}", size, rate(stage), "tokens/s") for stage in STAGES[:-1]),
        row("alone: sync", size, sync_seconds, "s"),
        *(row(f"alone: {stage}, CPU per 1,000 tokens", size, 1000 * cost[stage], "CPU-s") for stage in STAGES),
        row("bytes per completion token, generated", size, sum(step.generated_bytes for step in alone) / tokens, "B"),
        row("bytes per completion token, scored", size, sum(step.scored_bytes for step in alone) / tokens, "B"),
    ]


def _together_rows(together: Sequence[Together], cores: int, size: str) -> list[Row]:
    def median(name: str) -> float:
        return statistics.median(step.record[name] for step in together)

    core_seconds = cores * sum(step.spent.seconds for step in together)
    pools = (*ACTORS, DRIVER_AND_RAY)
    busy = {pool: sum(step.spent.cpu_seconds[pool] for step in together) / core_seconds for pool in pools}
    per_token = median("completion_tokens") / median("tokens")  # the learner's own rate counts prompts too
    return [
        row("together: generate", size, median("generate/tokens_per_second"), "tokens/s"),
        row("together: score", size, median("score/tokens_per_second"), "tokens/s"),
        row("together: learn", size, median("learn/tokens_per_second") * per_token, "tokens/s"),
        row("together: sync", size, median("sync/seconds"), "s"),
        *(row(f"together: cores busy, {pool}", size, share, "share") for pool, share in busy.items()),
        row("together: cores, not in use by the run", size, 1 - sum(busy.values()), "share"),
    ]


def _loop_rows(alone: Sequence[Alone], together: Sequence[Together], cores: int, size: str) -> list[Row]:
    """Compare per completion token: the student learns, so no two steps write equally much."""
    tokens_alone = sum(step.completion_tokens for step in alone)
    tokens_together = sum(step.completion_tokens for step in together)
    seconds_alone = sum(took.seconds for step in alone for took in step.stages.values()) / tokens_alone
    needed = sum(took.of_pools for step in alone for took in step.stages.values()) / tokens_alone
    seconds = sum(step.spent.seconds for step in together) / tokens_together
    return [
        row("loop: one stage after the other", size, 1 / seconds_alone, "tokens/s"),
        row("loop: together", size, 1 / seconds, "tokens/s"),
        row("loop: one stage after the other / together", size, seconds_alone / seconds, "ratio"),
        at_least(
            row("loop: CPU-s of stages alone / cores x s together", size, needed / (cores * seconds), "ratio"), BAR
        ),
    ]


def _completion_tokens(handles: Iterable[BatchHandle]) -> int:
    return sum(sum(handle.num_completion_tokens) for handle in handles)


def _wire_bytes(handles: Iterable[BatchHandle]) -> int:
    return sum(ray.get(handle.reference).size for handle in handles)


if __name__ == "__main__":
    main()
