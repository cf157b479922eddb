"""How near the balancer comes to the best split that somebody could have chosen: `python -m benchmarks.cases.balance`.

For each of five workloads (harness/workloads.py), on stub engines behind the real pools on real Ray: steps at every
split (`--parts sweep`, whose rows a later call may use); then the balancer, from the worst of them until it moves no
more, and at last steps at the split where it settled and at the two best, in turns. It is told nothing but what a run's
driver sees.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from benchmarks.cases.streaming import SAMPLING, TIMEOUTS, StubRun
from benchmarks.harness.report import RESULTS, Row, at_most, print_rows, row, write_rows
from benchmarks.harness.stub_processes import stub_process_run
from benchmarks.harness.workloads import WORKLOADS, Split, Workload
from cluster.config.stages import BalanceConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.files import Record, RecordsFile
from cluster.elastic.balance_policy import Balance, Horizon
from cluster.elastic.balancer import Balancer
from cluster.elastic.splits import ROLLOUT, PoolRule, Sizes, Space
from cluster.elastic.step_cost import WorkMeter
from cluster.nodes.local_cluster import local_cluster
from cluster.placement.capacity import SplitCapacity
from cluster.run.driver import Permits
from cluster.run.flow import Flow, StepBatches
from cluster.run.step_metrics import Stopwatch, step_record
from cluster.weight_sync.manifest import WeightSyncReport
from rollout_workers.pool import RolloutPool
from teacher_workers.pool import TeacherPool

COMMAND = "python -m benchmarks.cases.balance"
DIFFERENT_STEPS = 3  # done again and again, so that every split is given the same to do
MOST_STEPS = 80  # in which the balancer has to settle
QUIET_STEPS = 10  # without a decision: it has settled
TURNS = 3  # of the settled split and the best two, at the end
START_SECONDS = 5.0  # of a stub's process, as the balancer is told at first
BAR = 1.1
STATIC = "split "  # begins the name of a row of the sweep
ENDLESS = 1_000_000  # steps


@dataclass(frozen=True)
class Settled:
    """What the balancer did."""

    split: Split
    num_steps: int  # until its last decision
    num_moves: int
    sentences: tuple[str, ...]


class Steps:
    """A workload's steps, one after the other without an end, while the pools are resized."""

    def __init__(self, run: StubRun, workload: Workload) -> None:
        """Take running pools."""
        self._run, self._workload = run, workload
        self._done = self._forever()
        teachers = {f"teachers.{name}": pool for name, pool in run.teachers.pools.items()}
        self.pools: dict[str, RolloutPool | TeacherPool] = {ROLLOUT: run.rollouts, **teachers}

    def at(self, split: Split) -> list[float]:
        """Return the seconds of each of the different steps at a split."""
        for name, size in sizes_of(split).items():
            self.pools[name].resize(size)
        while not all(len(pool.state().serving) == pool.size for pool in self.pools.values()):
            next(self._done)
        for _ in range(self._workload.max_staleness):  # were begun with others
            next(self._done)
        return [next(self._done)[0]["step/seconds"] for _ in range(DIFFERENT_STEPS)]

    def balance(self, folder: Path) -> Settled:
        """Let the balancer move workers until it moves no more."""
        sentences: list[str] = []
        balance = self._balance()
        balancer = self._balancer(balance, RecordsFile(folder / "moves.jsonl"), sentences.append)
        last = step = 0
        for step in range(1, MOST_STEPS + 1):
            record, batches = next(self._done)
            num_said = len(sentences)
            balancer.after_step(step, record, batches)
            last = step if len(sentences) > num_said else last
            if step - last >= QUIET_STEPS and not balance.is_trying:
                break
        sizes = {name: pool.size for name, pool in self.pools.items()}
        teachers = {name: sizes[f"teachers.{name}"] for name in self._workload.teachers}
        return Settled(Split(sizes[ROLLOUT], teachers), last, balancer.num_moves, tuple(sentences))

    def _balance(self) -> Balance:
        space = Space({name: PoolRule(units=1) for name in self.pools}, units=0)
        horizon = Horizon(self._workload.max_staleness, START_SECONDS, TIMEOUTS.start_seconds)
        return Balance(space, BalanceConfig(mode="auto"), horizon)

    def _balancer(self, balance: Balance, moves: RecordsFile, say: Callable[[str], None]) -> Balancer:
        places = self._workload.config.rollout.engine.concurrent_sequences
        meter = WorkMeter(places, self._workload.max_staleness)
        return Balancer(
            balance, meter, lambda: self.pools, SplitCapacity(dict.fromkeys(self.pools, 0)), moves, say, ENDLESS
        )

    def _forever(self) -> Iterator[tuple[Record, list[BatchHandle]]]:
        """Do steps as the driver does, weight sync aside, and yield each one's record and batches."""
        run, flow = self._run, Flow(self._run.rollouts, self._run.teachers, TIMEOUTS.call_seconds)
        permits = Permits(0, ENDLESS, self._workload.max_staleness)
        asked: dict[int, StepBatches] = {}
        for step in range(ENDLESS):
            watch = Stopwatch()
            for admitted in permits.admit(step):
                requests = run.requests(admitted % DIFFERENT_STEPS)
                asked[admitted] = flow.admit(admitted, requests, SAMPLING, run.config.scorers)
            batches = asked.pop(step)
            with watch.measure("step"):
                learned = run.learner.step(batches, step)
                with watch.measure("sync"):
                    synced = WeightSyncReport(step, checksum="", num_bytes=0, seconds=0.0)
            yield step_record(step + 1, batches, learned, synced, watch), batches.finished


def sizes_of(split: Split) -> Sizes:
    """Return a split by pool."""
    return {ROLLOUT: split.rollout, **{f"teachers.{name}": size for name, size in split.teachers.items()}}


@contextmanager
def started(workload: Workload, split: Split) -> Iterator[Steps]:
    """Start a Ray cluster and a workload's pools, and do some steps to warm up."""
    with (
        local_cluster(num_cpus=4, include_dashboard=False, log_to_driver=False),
        stub_process_run(workload, split) as run,
    ):
        steps = Steps(run, workload)
        steps.at(split)
        yield steps


def sweep(workload: Workload) -> list[Row]:
    """Measure every split, and return a row of each."""
    rows = []
    with started(workload, workload.splits[0]) as steps:
        for split in workload.splits:
            rows.append(row(f"{STATIC}{split}", workload.name, fmean(steps.at(split)), "s"))
            print_rows(rows[-1:])
    return rows


def balanced(workload: Workload, static: Mapping[str, float]) -> list[Row]:
    """Let the balancer begin at the worst split, and return rows of it beside the two best, measured in turns."""
    splits = {str(split): split for split in workload.splits}
    best, second, *_, worst = sorted(static, key=static.__getitem__)
    with started(workload, splits[worst]) as steps, TemporaryDirectory() as folder:
        settled = steps.balance(Path(folder))
        print("\n".join(settled.sentences), flush=True)
        finalists = list(dict.fromkeys([str(settled.split), best, second]))
        seconds: dict[str, list[float]] = {name: [] for name in finalists}
        for turn in range(TURNS):
            for name in finalists[:: 1 if turn % 2 == 0 else -1]:
                seconds[name] += steps.at(splits[name])
    return rows_of(workload, settled, {name: fmean(values) for name, values in seconds.items()})


def rows_of(workload: Workload, settled: Settled, finals: Mapping[str, float]) -> list[Row]:
    """Return a workload's rows; `finals` are seconds of a step, at the end, by split."""
    reached, what = str(settled.split), workload.name
    best = min(finals, key=finals.__getitem__)
    return [
        row(f"best split, at the end: {best}", what, finals[best], "s"),
        row(f"balancer, from the worst split: {reached}", what, finals[reached], "s"),
        at_most(row("balancer / best split", what, finals[reached] / finals[best], "ratio"), BAR),
        row("moves", what, settled.num_moves, "moves"),
        row("steps until the last decision", what, settled.num_steps, "steps"),
    ]


def main() -> None:
    """Run the workloads, print the table and write it after each part."""
    names = [workload.name for workload in WORKLOADS]
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=names, default=names, help="others keep their rows")
    parser.add_argument("--parts", nargs="+", choices=["sweep", "balancer"], default=["sweep", "balancer"])
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/DATE-balance.json")
    options = parser.parse_args()
    output = options.output or RESULTS / f"{date.today():%Y-%m-%d}-balance.json"
    rows = json.loads(output.read_text())["rows"] if output.exists() else []
    for workload in WORKLOADS:
        if workload.name not in options.workloads:
            continue
        own = [found for found in rows if found["size"] == workload.name and found["name"].startswith(STATIC)]
        if "sweep" in options.parts:
            own = sweep(workload)
        if "balancer" in options.parts:
            measured = balanced(workload, {found["name"].removeprefix(STATIC): found["value"] for found in own})
            print_rows(measured)
            own = [*own, *measured]
        rows = [found for found in rows if found["size"] != workload.name] + own
        write_rows(output, COMMAND, sorted(rows, key=lambda found: names.index(found["size"])))
    print(f"written: {output}")


if __name__ == "__main__":
    main()
