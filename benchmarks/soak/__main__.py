"""`python -m benchmarks.soak --minutes 20`: do random delays everywhere lose, repeat, reorder or leak anything?

Pools, actors, Ray, Arrow, flow, permits, the learner's planning and the weight sync are the real ones; engines wait
instead of computing, each time for a random time with a heavy tail, and so does the driver (benchmarks/soak/actors.py).
After every step the ranks say which trajectories they learned from, how old those were and which steps they took, and
that is compared with what was asked. Memory is judged by the line through its samples after a warm-up. Exit code 1 when
a bar is missed.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from statistics import mean, median

from benchmarks.harness.report import RESULTS, Row, at_most, describe_machine, print_rows, row
from benchmarks.soak.actors import Delays
from benchmarks.soak.learner import RankReport
from benchmarks.soak.memory import MemorySample, MemorySampler, growth_per_ten_minutes
from benchmarks.soak.pools import WAIT_SECONDS, SoakPools, soak_pools
from cluster.actors.cluster import RAY
from cluster.contracts.errors import PreceptorError
from cluster.nodes.local_cluster import local_cluster
from cluster.run.driver import Permits
from cluster.run.flow import Flow, StepBatches
from cluster.run.inputs import train_requests, train_sampling

MEAN_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.02, 3.0
SAMPLE_SECONDS = 10.0
STORE_BYTES = 1 << 28
MIN_FITTED_SAMPLES = 6
# Memory is judged over at least ten minutes: before, the scatter of its samples moves the line by more than these.
MIN_JUDGED_SECONDS = 600.0
# In ten minutes, of all processes together: 0.6 % of the 2.5 GB that they hold. A handle (2.3 kB) kept of each batch of
# four rows would be 18 MB; what allocators still took after the warm-up was 14 MB between minutes 3 and 8, and falling.
MAX_HEAP_GROWTH_MB = 15.0
MAX_STORE_GROWTH_MB = 1.0  # in ten minutes; about what one step keeps there
# With its list of past calls, Ray's own heaps grew at 178 MB in ten minutes where they grow at 11 without.
NO_TASK_HISTORY = {"task_events_report_interval_ms": 0}


@dataclass
class Ledger:
    """What became of everything that was asked; every count but the first three should stay 0."""

    max_staleness: int
    steps: int = 0
    trajectories: int = 0
    largest_staleness: int = 0
    lost: int = 0  # trajectories of a step that no rank learned from in it
    repeated: int = 0  # that were learned from once too often
    uncalled: int = 0  # that were learned from in a step that had not asked for them
    too_old: int = 0  # or younger than the weights that learned from them
    out_of_order: int = 0  # steps that a rank took at another place than the next

    def check_step(self, step: int, asked: Sequence[int], reports: Sequence[RankReport]) -> None:
        """Compare a step's trajectory ids with what the ranks did; ids are unique in the run."""
        rows = [found for report in reports for found in report.rows]
        learned = Counter(found.trajectory_id for found in rows)
        self.lost += sum(trajectory not in learned for trajectory in asked)
        self.repeated += sum(count - 1 for count in learned.values())
        self.uncalled += len(learned.keys() - set(asked))
        self.too_old += sum(not 0 <= found.staleness <= self.max_staleness for found in rows)
        self.out_of_order += sum(report.steps != (self.steps,) or step != self.steps for report in reports)
        self.largest_staleness = max([self.largest_staleness, *(found.staleness for found in rows)])
        self.steps += 1
        self.trajectories += len(asked)


@dataclass
class Loop:
    """The driver's loop, until a time is up and everything that was admitted is learned from."""

    pools: SoakPools
    delays: Delays
    until: float  # on the clock of `perf_counter`
    ledger: Ledger
    step_seconds: list[float] = field(default_factory=list)
    failure: str = "the loop did not end"  # empty once it has

    def __post_init__(self) -> None:
        """Take the time from which the first step is measured."""
        self.step_started = time.perf_counter()

    def run(self) -> None:
        """Do steps; what ends them early becomes `failure`."""
        try:
            self._run()
            self.failure = ""
        except PreceptorError as error:
            self.failure = str(error)

    def _run(self) -> None:
        config, pools = self.pools.config, self.pools
        flow = Flow(pools.rollouts, pools.teachers, WAIT_SECONDS)
        permits = Permits(0, sys.maxsize, config.rollout.max_staleness)
        sampling = train_sampling(config)
        under_way: dict[int, tuple[list[int], StepBatches]] = {}  # trajectory ids, and what gives them out
        pools.learner.publish_weights(pools.rollouts.actors, policy_version=0)
        step = 0
        while (goes_on := time.perf_counter() < self.until) or under_way:
            self.step_started = time.perf_counter()
            for admitted in permits.admit(step) if goes_on else ():
                requests = train_requests(config, pools.inputs, admitted)
                ids = [request.trajectory_id for request in requests]
                under_way[admitted] = ids, flow.admit(admitted, requests, sampling, config.scorers)
            time.sleep(self.delays.seconds("driver", step))
            asked, batches = under_way.pop(step)
            pools.learner.step(batches, step)
            pools.learner.publish_weights(pools.rollouts.actors, policy_version=step + 1)
            self.ledger.check_step(step, asked, self._reports())
            self.step_seconds.append(time.perf_counter() - self.step_started)
            step += 1

    def _reports(self) -> list[RankReport]:
        references = [rank.report.remote() for rank in self.pools.ranks]
        reports: list[RankReport] = RAY.get(references, WAIT_SECONDS, "the ranks to say what they did")
        return reports


def main() -> int:
    """Soak, print the rows and write them; exit code 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0, help="of the delays")
    parser.add_argument("--warm-up-seconds", type=float, default=180.0, help="before memory is judged")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today():%Y-%m-%d}-soak.json")
    options = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    delays = Delays(options.seed, MEAN_DELAY_SECONDS, LONGEST_DELAY_SECONDS)
    cluster = local_cluster(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=STORE_BYTES,
        _system_config=NO_TASK_HISTORY,
    )
    with cluster, soak_pools(delays) as pools:
        loop, samples = soak(pools, delays, 60 * options.minutes)
    rows = [*loop_rows(loop), *memory_rows(samples, options.warm_up_seconds)]
    print_rows(rows)
    if loop.failure:
        print(f"what ended it: {loop.failure}")
    described = {"command": "python -m benchmarks.soak", "seed": options.seed, **describe_machine()}
    series = {name.name: [getattr(sample, name.name) for sample in samples] for name in fields(MemorySample)}
    result = {"machine": described, "rows": rows, "failure": loop.failure, "series": series}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {options.output}")
    return 0 if all(found["met"] for found in rows if "met" in found) else 1


def soak(pools: SoakPools, delays: Delays, seconds: float) -> tuple[Loop, list[MemorySample]]:
    """Run the loop beside a sampler, and leave it alone when a step takes longer than its waits may."""
    sampler, samples = MemorySampler(), []
    ledger = Ledger(pools.config.rollout.max_staleness)
    loop = Loop(pools, delays, time.perf_counter() + seconds, ledger)
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    while thread.is_alive() and time.perf_counter() - loop.step_started < 2 * WAIT_SECONDS:
        samples.append(sampler.sample())
        thread.join(SAMPLE_SECONDS)
    return loop, samples


def loop_rows(loop: Loop) -> list[Row]:
    """Return what the loop did, and the bars that do not depend on how long it ran."""
    ledger, size = loop.ledger, f"{loop.ledger.steps} steps"
    longest_seconds = max(loop.step_seconds, default=0.0)
    return [
        row("soak: trajectories", size, ledger.trajectories, "rows"),
        row("soak: median step", size, median(loop.step_seconds or [0.0]), "s"),
        at_most(row("soak: longest step", size, longest_seconds, "s"), WAIT_SECONDS),
        at_most(row("soak: ended early or stuck", size, bool(loop.failure), "runs"), 0),
        at_most(row("soak: lost", size, ledger.lost, "rows"), 0),
        at_most(row("soak: repeated", size, ledger.repeated, "rows"), 0),
        at_most(row("soak: learned from in another step", size, ledger.uncalled, "rows"), 0),
        at_most(row("soak: staleness out of bounds", size, ledger.too_old, "rows"), 0),
        at_most(row("soak: steps out of order", size, ledger.out_of_order, "steps"), 0),
        at_most(row("soak: largest staleness", size, ledger.largest_staleness, "steps"), ledger.max_staleness),
    ]


def memory_rows(samples: Sequence[MemorySample], warm_up_seconds: float) -> list[Row]:
    """Return the growth of memory after the warm-up; none where too few samples are left to tell."""
    judged = [sample for sample in samples if sample.seconds >= warm_up_seconds]
    if len(judged) < MIN_FITTED_SAMPLES:
        return []
    seconds = [sample.seconds for sample in judged]
    span_seconds = seconds[-1] - seconds[0]
    size, unit = f"{span_seconds / 60:.1f} min, {len(judged)} samples", "MB/10 min"

    def growth(name: str) -> float:
        return growth_per_ten_minutes(seconds, [getattr(sample, name) for sample in judged]) / 1e6

    heaps = row("soak: growth of all heaps", size, growth("heap_bytes"), unit)
    store = row("soak: growth of the object store", size, growth("store_bytes"), unit)
    if span_seconds >= MIN_JUDGED_SECONDS:
        heaps, store = at_most(heaps, MAX_HEAP_GROWTH_MB), at_most(store, MAX_STORE_GROWTH_MB)
    return [
        row("soak: heaps of all processes", size, judged[-1].heap_bytes / 1e6, "MB"),
        heaps,
        row("soak: growth of the driver's heap", size, growth("driver_bytes"), unit),
        row("soak: growth of the actors' heaps", size, growth("actor_bytes"), unit),
        row("soak: growth of Ray's own heaps", size, growth("ray_bytes"), unit),
        row("soak: object store", size, mean(sample.store_bytes for sample in judged) / 1e6, "MB"),
        store,
    ]


if __name__ == "__main__":
    sys.exit(main())
