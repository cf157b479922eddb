"""How near the balancer comes to the best split that somebody could have chosen: `python -m benchmarks.balance`.

For each of five workloads (benchmarks/workloads.py), on stub engines behind the real pools on real Ray: steps at every
split; then the balancer, from the worst of them until it moves no more; then steps at the split where it settled and
at the two best, in turns. It is told nothing but what a run's driver sees.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from benchmarks.lone_stubs import lone_run
from benchmarks.report import RESULTS, Row, at_most, print_rows, row, write_rows
from benchmarks.streaming import SAMPLING, TIMEOUTS, StubRun
from benchmarks.workloads import WORKLOADS, Split, Workload
from cluster.balance import Balance, Horizon
from cluster.balancer import MOVES, Announcements, Balancer, Movable
from cluster.contracts.balance import BalanceConfig
from cluster.contracts.interfaces import BatchHandle
from cluster.contracts.weights import WeightSyncReport
from cluster.flow import Flow, StepBatches
from cluster.local_cluster import local_cluster
from cluster.metric_sinks import Record, RecordsFile
from cluster.permits import Permits
from cluster.room import SplitRoom
from cluster.splits import ROLLOUT, PoolRule, Sizes, Space
from cluster.step_record import step_record
from cluster.step_work import WorkMeter
from cluster.stopwatch import Stopwatch

COMMAND = "python -m benchmarks.balance"
DIFFERENT_STEPS = 3  # done again and again, so that every split is given the same to do
MOST_STEPS = 80  # in which the balancer has to settle
QUIET_STEPS = 10  # without a decision: it has settled
TURNS = 3  # of the settled split and the best two, at the end
START_SECONDS = 5.0  # of a stub's process, as the balancer is told at first
BAR = 1.1
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
        self.pools: dict[str, Movable] = {ROLLOUT: run.rollouts, **teachers}

    def at(self, split: Split) -> list[float]:
        """Return the seconds of each of the different steps at a split."""
        for name, size in sizes_of(split).items():
            self.pools[name].resize(size)
        while not all(len(pool.state().serving) == pool.size for pool in self.pools.values()):
            next(self._done)
        for _ in range(1 + self._workload.max_staleness):  # were begun with others
            next(self._done)
        return [next(self._done)[0]["step/seconds"] for _ in range(DIFFERENT_STEPS)]

    def balance(self, folder: Path) -> Settled:
        """Let the balancer move workers until it moves no more."""
        sentences: list[str] = []
        balancer = self._balancer(Announcements(sentences.append, RecordsFile(folder / "moves.jsonl")))
        num_moves = last = step = 0
        for step in range(1, MOST_STEPS + 1):
            record, batches = next(self._done)
            num_said = len(sentences)
            num_moves += int(balancer.after_step(record, batches, ENDLESS)[MOVES])
            last = step if len(sentences) > num_said else last
            if step - last >= QUIET_STEPS:
                break
        sizes = {name: pool.size for name, pool in self.pools.items()}
        teachers = {name: sizes[f"teachers.{name}"] for name in self._workload.teachers}
        return Settled(Split(sizes[ROLLOUT], teachers), last, num_moves, tuple(sentences))

    def _balancer(self, announcements: Announcements) -> Balancer:
        ahead = self._workload.max_staleness
        room = SplitRoom(dict.fromkeys(self.pools, 0))
        space = Space({name: PoolRule(units=1) for name in self.pools}, units=0)
        horizon = Horizon(ahead, START_SECONDS, TIMEOUTS.start_seconds)
        meter = WorkMeter(self._workload.config.rollout.engine.max_concurrent_sequences, ahead)
        balance = Balance(space, BalanceConfig(mode="auto"), horizon)
        return Balancer(balance, meter, self.pools, room, announcements)

    def _forever(self) -> Iterator[tuple[Record, list[BatchHandle]]]:
        """Do steps as the driver does, weight sync aside, and yield each one's record and batches."""
        run, flow = self._run, Flow(self._run.rollouts, self._run.teachers, TIMEOUTS.call_seconds)
        permits = Permits(0, ENDLESS, self._workload.max_staleness)
        asked: dict[int, StepBatches] = {}
        for step in range(ENDLESS):
            watch = Stopwatch()
            for admitted in permits.admit(step):
                requests = run.requests(admitted % DIFFERENT_STEPS)
                asked[admitted] = flow.admit(admitted, requests, SAMPLING, "exact", run.config.scorers)
            batches = asked.pop(step)
            with watch.measure("step"):
                learned = run.learner.step(batches, step)
                with watch.measure("sync"):
                    synced = WeightSyncReport(step, checksum="", num_bytes=0, seconds=0.0)
            yield step_record(step + 1, batches.progress, learned, synced, watch), batches.progress.finished


def sizes_of(split: Split) -> Sizes:
    """Return a split by pool."""
    return {ROLLOUT: split.rollout, **{f"teachers.{name}": size for name, size in split.teachers.items()}}


def measure(workload: Workload, say: Callable[[str], None]) -> list[Row]:
    """Measure every split, the balancer, and at last the settled split beside the two best."""
    static: dict[str, float] = {}
    splits = {str(split): split for split in workload.splits}
    with (
        local_cluster(num_cpus=4, include_dashboard=False, log_to_driver=False),
        TemporaryDirectory() as folder,
        lone_run(workload, workload.splits[0]) as run,
    ):
        steps = Steps(run, workload)
        steps.at(workload.splits[0])  # warms up
        for name, split in splits.items():
            static[name] = fmean(steps.at(split))
            say(f"{workload.name}: {name}: {static[name]:.2f} s")
        best, second, *_, worst = sorted(static, key=static.__getitem__)
        steps.at(splits[worst])
        settled = steps.balance(Path(folder))
        say("\n".join(settled.sentences))
        finalists = dict.fromkeys([str(settled.split), best, second])
        seconds: dict[str, list[float]] = {name: [] for name in finalists}
        for turn in range(TURNS):
            for name in list(finalists)[:: 1 if turn % 2 == 0 else -1]:
                seconds[name] += steps.at(splits[name])
    return rows_of(workload, static, settled, {name: fmean(values) for name, values in seconds.items()})


def rows_of(
    workload: Workload, static: Mapping[str, float], settled: Settled, finals: Mapping[str, float]
) -> list[Row]:
    """Return a workload's rows."""
    reached, best = str(settled.split), min(finals, key=finals.__getitem__)
    worst, what = max(static, key=static.__getitem__), workload.name
    return [
        row(f"worst static split: {worst}", what, static[worst], "s"),
        row(f"best static split: {best}", what, finals[best], "s"),
        row(f"balancer, from the worst: {reached}", what, finals[reached], "s"),
        at_most(row("balancer / best static split", what, finals[reached] / finals[best], "ratio"), BAR),
        row("moves", what, settled.num_moves, "moves"),
        row("steps until the last decision", what, settled.num_steps, "steps"),
    ]


def main() -> None:
    """Run the workloads, print the table and write it after each."""
    names = [workload.name for workload in WORKLOADS]
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=names, default=names, help="others keep their rows")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/DATE-balance.json")
    options = parser.parse_args()
    output = options.output or RESULTS / f"{date.today():%Y-%m-%d}-balance.json"
    rows = json.loads(output.read_text())["rows"] if output.exists() else []
    for workload in WORKLOADS:
        if workload.name in options.workloads:
            measured = measure(workload, lambda line: print(line, flush=True))
            rows = [found for found in rows if found["size"] != workload.name] + measured
            print_rows(measured)
            write_rows(output, COMMAND, sorted(rows, key=lambda found: names.index(found["size"])))
    print(f"written: {output}")


if __name__ == "__main__":
    main()
