"""`python -m benchmarks.cases.cluster_life`: a submitted run on a rack of hosts lives through what happens to clusters.

Each node of the Ray cluster is a host of its own (harness/hosts.py). The embedded run is submitted to the head
twice. The first is left alone. Of the second, pools grow and shrink by `preceptor scale` (rollout 1, 3, 2; teachers 1,
2, 1), and a host that holds workers loses its network and is switched off; the printed seed decides which. Both are
followed to their end. Rows: what was lost, prompts consumed exactly once according to the ledgers, held-out accuracy of
both runs.
"""

import argparse
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from benchmarks.cases.chaos import Outcome, audited_prompts, last_record, noise
from benchmarks.harness.hosts import Rack, isolated
from benchmarks.harness.ray_cluster import Door, cluster_of_hosts, preceptor, submit, wait_until
from benchmarks.harness.report import RESULTS, Row, at_least, at_most, print_rows, row, write_rows
from cluster.demo import embedded_config
from cluster.run.inputs import load_inputs

NODES = ("node-1", "node-2", "node-3")
STALL_SECONDS = 400.0  # a node's death is noticed after about 20 s, and engines start within a minute
GROWN = {"rollout": 3, "teachers.countdown": 2}
SHRUNK = {"rollout": 2, "teachers.countdown": 1}
POOLS = {"rollout": "rollout", "teachers.countdown": "teacher-countdown"}  # a request's name, and that in the figures


@dataclass(frozen=True)
class Life:
    """What became of the disturbed run's workers."""

    lost: Sequence[str]  # workers on the host that was switched off
    restarts: int
    followed_steps: int  # lines of steps that the followed job showed


@dataclass
class SubmittedRun:
    """A run that is followed."""

    door: Door
    directory: Path
    output: Path
    overrides: Sequence[str]
    reached: list[dict[str, int]] = field(default_factory=list)  # sizes that were asked for, and served

    def __post_init__(self) -> None:
        """Submit it."""
        self.started = time.perf_counter()
        wanted = [f"run.directory={self.directory.parent}", f"run.name={self.directory.name}", *self.overrides]
        with self.output.open("w") as output:
            self._process = submit(self.door, wanted, output)

    def wait_for(self, figures: dict[str, float]) -> None:
        """Wait until the last step's figures are at least these."""
        what = f"{self.directory.name} had {figures}; see what it printed above"
        wait_until(lambda: self._has(figures), STALL_SECONDS, what)

    def scale(self, sizes: dict[str, int]) -> None:
        """Change the sizes of pools, one command each, and wait until as many workers serve."""
        for name, size in sizes.items():
            command = preceptor(self.door, "scale", str(self.directory), f"{name}={size}", output=sys.stderr)
            if command.wait() != 0:
                raise SystemExit(f"{name}={size} was refused")
        wanted = {f"pool/{POOLS[name]}/serving": size for name, size in sizes.items()}
        wait_until(lambda: self._is(wanted), STALL_SECONDS, f"{self.directory.name} has {wanted}")
        self.reached.append(sizes)
        print(f"after step {last_record(self.directory)['step']}: {sizes}", flush=True)

    def finish(self) -> Outcome:
        """Wait for the end and audit the ledger.

        Raises:
            PreceptorError: the ledger is not that of a run that learned from everything once.
        """
        code = self._process.wait()
        if code != 0:
            raise SystemExit(f"{self.directory.name}: the run ended with exit code {code}")
        last, config = last_record(self.directory), embedded_config(self.overrides)
        return Outcome(
            steps=int(last["step"]),
            prompts=audited_prompts(self.directory, self.overrides),
            accuracy=float(last["held_out/accuracy"]),
            num_held_out=len(load_inputs(config).held_out_ids),
            seconds=time.perf_counter() - self.started,
        )

    def close(self) -> None:
        """End what follows it."""
        self._process.terminate()
        self._process.wait()

    def _has(self, figures: dict[str, float]) -> bool:
        self._check_alive()
        last = last_record(self.directory)
        return all(last.get(name, 0.0) >= value for name, value in figures.items())

    def _is(self, figures: dict[str, int]) -> bool:
        self._check_alive()
        last = last_record(self.directory)
        return all(last.get(name) == value for name, value in figures.items())

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            raise SystemExit(f"{self.directory.name}: the run was over too early; give it more --steps")


def measure(options: argparse.Namespace) -> list[Row]:
    """Submit both runs, disturb the second, and compare."""
    size = f"embedded pair, {options.steps} steps, {1 + len(NODES)} hosts"
    overrides = [
        f"run.steps={options.steps}",
        "prompts.prompts_per_step=48",
        "checkpoint.every_steps=5",
        "checkpoint.export=false",
        "evaluation.teacher_too=false",
        "ray.max_restarts=1000",
    ]
    with cluster_of_hosts(NODES) as (door, hosts):
        with submitted(door, hosts.folder / "quiet", overrides) as run:
            quiet = run.finish()
        print(f"undisturbed: {quiet}", flush=True)
        with submitted(door, hosts.folder / "shaken", overrides) as run:
            lost = disturb(run, hosts, random.Random(options.seed))
            shaken = run.finish()
            life = look_back(run, lost)
    difference = abs(quiet.accuracy - shaken.accuracy)
    return [
        at_least(row("cluster life: workers lost with a host", size, len(life.lost), "workers"), 1),
        row("cluster life: workers started again", size, life.restarts, "workers"),
        *sizes_reached(run, size),
        at_least(row("cluster life: steps completed", size, shaken.steps, "steps"), options.steps),
        at_least(row("cluster life: steps shown by who follows", size, life.followed_steps, "steps"), options.steps),
        at_least(row("cluster life: prompts consumed exactly once", size, shaken.prompts, "prompts"), quiet.prompts),
        row("cluster life: accuracy, undisturbed", size, quiet.accuracy, "ratio"),
        row("cluster life: accuracy, disturbed", size, shaken.accuracy, "ratio"),
        at_most(row("cluster life: difference in accuracy", size, difference, "ratio"), noise(quiet)),
        row("cluster life: seconds, undisturbed", size, quiet.seconds, "s"),
        row("cluster life: seconds, disturbed", size, shaken.seconds, "s"),
    ]


def sizes_reached(run: SubmittedRun, size: str) -> list[Row]:
    """Return a row per pool and size that was asked for."""
    return [
        row(f"cluster life: {name} scaled to", size, count, "workers")
        for sizes in run.reached
        for name, count in sizes.items()
    ]


def disturb(run: SubmittedRun, hosts: Rack, chance: random.Random) -> list[str]:
    """Let pools grow, switch a host off, let pools shrink; return who was on the host."""
    run.wait_for({"step": 2})
    run.scale(GROWN)
    address = chance.choice([host.address for host in hosts.hosts.values() if workers_on(run.door, host.address)])
    [target] = [host for host in hosts.hosts.values() if host.address == address]
    lost = workers_on(run.door, address)
    target.switch_off()
    print(f"after step {last_record(run.directory)['step']}: {target.name} is off, with {', '.join(lost)}", flush=True)
    wait_until(lambda: address not in run.door.nodes().values(), STALL_SECONDS, f"Ray notices that {address} is gone")
    run.wait_for({"step": last_record(run.directory)["step"] + 2})
    run.scale(SHRUNK)
    return lost


def workers_on(door: Door, address: str) -> list[str]:
    """Return the names of the run's actors on a host."""
    nodes = door.nodes()
    actors = [actor for actor in door.living_actors() if actor["class_name"].endswith("Actor") and actor["name"]]
    return sorted(actor["name"] for actor in actors if nodes.get(actor["node_id"]) == address)


def look_back(run: SubmittedRun, lost: Sequence[str]) -> Life:
    """Read from the run's last figures and its output what became of its workers."""
    last = last_record(run.directory)
    restarts = sum(int(value) for name, value in last.items() if name.endswith("/restarts"))
    shown = set(re.findall(r"^step (\d+) ", run.output.read_text(), re.MULTILINE))
    return Life(lost, restarts, len(shown))


@contextmanager
def submitted(door: Door, directory: Path, overrides: Sequence[str]) -> Iterator[SubmittedRun]:
    """Submit a run; what it printed goes to stderr at the end."""
    run = SubmittedRun(door, directory, directory.with_name(f"{directory.name}.txt"), overrides)
    try:
        yield run
    finally:
        run.close()
        sys.stderr.write(run.output.read_text())


def main() -> int:
    """Measure and write the rows; exit code 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.cluster_life", description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today():%Y-%m-%d}-cluster-life.json")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the program runs in its namespaces
    options = parser.parse_args()
    if not options.inside:
        wanted = {"--steps": options.steps, "--seed": options.seed, "--output": options.output.resolve()}
        words = [str(word) for pair in wanted.items() for word in pair]
        isolated("benchmarks.cases.cluster_life", [*words, "--inside"])
    print(f"seed {options.seed}", flush=True)
    rows = measure(options)
    print_rows(rows)
    write_rows(
        options.output, f"python -m benchmarks.cases.cluster_life --steps {options.steps} --seed {options.seed}", rows
    )
    return 0 if all(found["met"] for found in rows if "met" in found) else 1


if __name__ == "__main__":
    sys.exit(main())
