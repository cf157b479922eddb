"""`python -m benchmarks.soak --minutes 20`: do random delays everywhere lose, repeat, reorder or leak anything?

Pools, actors, Ray, Arrow, flow, permits, the learner's planning and the weight sync are the real ones; engines wait
instead of computing, each time for a random time with a heavy tail, and so does the driver (benchmarks/soak_pools.py).
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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from benchmarks.report import RESULTS, Row, describe_machine, print_rows, row
from benchmarks.soak_learner import RankReport, WaitingLearnerActor
from benchmarks.soak_memory import MemorySample, MemorySampler, growth_per_ten_minutes
from benchmarks.soak_pools import Delays, WaitingRolloutActor, WaitingTeacherActor
from cluster.actors import PoolTimeouts, create_actors, get_all
from cluster.contracts.config import Config, EngineConfig, StudentConfig, TeacherConfig
from cluster.contracts.errors import ActorError
from cluster.contracts.run_file import parse_run_config
from cluster.flow import Flow
from cluster.permits import Permits
from cluster.pipeline import Inputs, train_requests, train_sampling
from learner.group import LearnerGroup
from rollout_workers.pool import RolloutActorSettings, RolloutPool
from rollout_workers.prompts import PromptOrder, PromptSet
from teacher_workers.pool import TeacherPool, TeacherPools

WAIT_SECONDS = 60.0  # the timeout of every wait; twenty times the longest delay
RUN = f"""
objective = "opd-grpo"                # a prompt's samples wait for each other at the learner
student.model = "stub"
teachers.left.model = "stub"
teachers.right.model = "stub"
prompts = {{ train = "stub", prompts_per_step = 16 }}
rollout = {{ samples_per_prompt = 2, rows_per_batch = 4, max_staleness = 2, max_completion_tokens = 400 }}
learner = {{ num_workers = 2, micro_batch_tokens = 2048 }}
ray = {{ start_timeout_seconds = 120.0, call_timeout_seconds = {WAIT_SECONDS} }}
"""
NUM_ROLLOUT_WORKERS, NUM_TEACHER_WORKERS = 3, 2  # the latter for each of the two teachers
NUM_PROMPTS, PROMPT_TOKENS = 100, 8
MEAN_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.05, 3.0
SAMPLE_SECONDS = 10.0
STORE_BYTES = 1 << 28
MIN_FITTED_SAMPLES = 6
ONE_CPU = {"num_cpus": 0}  # of Ray's accounting: waiting takes none
# The soak hands out about 70 trajectories a second, 40,000 in ten minutes: 100 bytes kept of each would be 4 MB. Python's
# and Ray's allocators settle for longer than the warm-up, by less than this.
MAX_PROCESS_GROWTH_MB = 10.0  # in ten minutes
MAX_STORE_GROWTH_MB = 2.0  # in ten minutes; about one step's batches and weights
NO_TASK_HISTORY = {"task_events_report_interval_ms": 0}  # Ray keeps 100,000 calls, which fills up for half an hour


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


@dataclass(frozen=True)
class SoakPools:
    """The running pools."""

    config: Config
    inputs: Inputs
    rollouts: RolloutPool
    teachers: TeacherPools
    learner: LearnerGroup
    ranks: Sequence[ActorHandle]  # of `learner`


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
        except ActorError as error:
            self.failure = str(error)

    def _run(self) -> None:
        config, pools = self.pools.config, self.pools
        flow = Flow(pools.rollouts, pools.teachers, WAIT_SECONDS)
        permits = Permits(0, sys.maxsize, config.rollout.max_staleness)
        sampling = train_sampling(config)
        asked: dict[int, list[int]] = {}
        pools.learner.publish_weights(pools.rollouts.actors, policy_version=0)
        step = 0
        while time.perf_counter() < self.until or asked:
            self.step_started = time.perf_counter()
            for admitted in permits.admit(step) if self.step_started < self.until else ():
                requests = train_requests(config, pools.inputs, admitted)
                asked[admitted] = [request.trajectory_id for request in requests]
                flow.admit(admitted, requests, sampling, "exact", config.scorers)
            time.sleep(self.delays.seconds("driver", step))
            pools.learner.step(flow.batches(step), step)
            pools.learner.publish_weights(pools.rollouts.actors, policy_version=step + 1)
            self.ledger.check_step(step, asked.pop(step), self._reports())
            self.step_seconds.append(time.perf_counter() - self.step_started)
            step += 1

    def _reports(self) -> list[RankReport]:
        references = [rank.report.remote() for rank in self.pools.ranks]
        reports: list[RankReport] = get_all(references, WAIT_SECONDS, "the ranks to say what they did")
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
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=STORE_BYTES,
        _system_config=NO_TASK_HISTORY,
    )
    delays = Delays(options.seed, MEAN_DELAY_SECONDS, LONGEST_DELAY_SECONDS)
    with soak_pools(delays) as pools:
        loop, samples = soak(pools, delays, 60 * options.minutes)
    ray.shutdown()
    rows = [*loop_rows(loop), *memory_rows(samples, options.warm_up_seconds)]
    print_rows(rows)
    described = {"command": "python -m benchmarks.soak", "seed": options.seed, **describe_machine()}
    series = {name.name: [getattr(sample, name.name) for sample in samples] for name in fields(MemorySample)}
    result = {"machine": described, "rows": rows, "failure": loop.failure, "series": series}
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
