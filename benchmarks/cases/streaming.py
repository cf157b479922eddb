"""How the stages overlap on separate pools, and what the driver costs: `python -m benchmarks.cases.streaming`.

Stub engines (harness/stub_pools.py) wait as long as hardware of given rates would; pools, Arrow, Ray, flow, permits
and the learner's planning are the real ones. Cases are run in turns; figures are medians over steps.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from benchmarks.harness.report import RESULTS, Row, at_least, at_most, print_rows, row, write_rows
from benchmarks.harness.stub_pools import (
    SharedProcesses,
    StubRates,
    completion_length,
)
from cluster.actors.cluster import PoolTimeouts
from cluster.config.run_config import Config
from cluster.config.run_file import parse_run_config
from cluster.config.sections import StudentConfig
from cluster.config.stages import EngineConfig, TeacherConfig
from cluster.contracts.batches import ReadyBatches
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from cluster.nodes.local_cluster import local_cluster
from cluster.run.driver import Permits
from cluster.run.flow import Flow, StepBatches
from learner.group import LearnerGroup
from rollout_workers.pool import RolloutActorSettings, RolloutPool
from rollout_workers.prompts import PromptSet, sampling_seed
from teacher_workers.pool import start_pool
from teacher_workers.router import TeacherRouter

RUN = '[student]\nmodel = "stub"\n[teachers.main]\nmodel = "stub"\n[prompts]\ntrain = "stub"\n'
SAMPLING = SamplingSettings(max_completion_tokens=800, temperature=1.0)
TIMEOUTS = PoolTimeouts(start_seconds=300, call_seconds=300)
SEQUENCES_PER_WORKER = 16
PROMPT_TOKENS = 8
# Lengths between 10 and 800 tokens, most near 100: a step waits for its longest.
LONG_TAIL = StubRates(2.5e-3, SEQUENCES_PER_WORKER, 1.0, 1.0, median_length=100, sigma=0.8, longest=800)
INSTANT = replace(LONG_TAIL, seconds_per_token=0.0, score_tokens_per_second=1e12, learn_tokens_per_second=1e12)
TIMES_AT_ONCE = (1, 2, 4)  # as many trajectories as all workers write at once; is the driver's time linear in them?
SCORE_SECONDS, LEARN_SECONDS = 1.0, 1.2  # of one step, if nothing else ran; generation takes 2 s for its longest


@dataclass
class StubRun:
    """Running pools and the steps that they are asked for."""

    config: Config
    rollouts: RolloutPool
    teachers: TeacherRouter
    learner: LearnerGroup
    rows_per_step: int

    def requests(self, step: int) -> list[RolloutRequest]:
        """Return the requests of a step: the same ones whenever it is done again."""
        first = step * self.rows_per_step
        return [RolloutRequest(first + row, row, 0, sampling_seed(0, step, row)) for row in range(self.rows_per_step)]

    def sequential(self, steps: Sequence[int]) -> list[float]:
        """Generate, then score, then learn; return the seconds of each step."""
        seconds = []
        for step in steps:
            started = time.perf_counter()
            generated = list(self.rollouts.generate(self.requests(step), SAMPLING))
            scored = list(self.teachers.score(generated, self.config.scorers))
            self.learner.step(ReadyBatches(scored), step)
            seconds.append(time.perf_counter() - started)
        return seconds

    def streaming(self, steps: Sequence[int], max_staleness: int = 0) -> list[float]:
        """Do the steps as the driver does, weight sync aside; return the seconds of each."""
        flow = Flow(self.rollouts, self.teachers, TIMEOUTS.call_seconds)
        permits = Permits(steps[0], steps[-1] + 1, max_staleness)
        asked: dict[int, StepBatches] = {}
        seconds = []
        for step in steps:
            started = time.perf_counter()
            for admitted in permits.admit(step):
                asked[admitted] = flow.admit(admitted, self.requests(admitted), SAMPLING, self.config.scorers)
            self.learner.step(asked.pop(step), step)
            seconds.append(time.perf_counter() - started)
        return seconds


@dataclass(frozen=True)
class StubSizes:
    """How many workers the pools have."""

    rollout: int
    teachers: Mapping[str, int]


@contextmanager
def stub_run(num_workers: int, rates: StubRates, rows_per_step: int) -> Iterator[StubRun]:
    """Start pools of `num_workers` rollout workers, a quarter as many teacher workers, and one learner rank."""
    config = parse_run_config(RUN, ["objective=thinking-machines", "learner.micro_batch_tokens=4096"])
    sizes = StubSizes(num_workers, {"main": max(1, num_workers // 4)})
    prompts = PromptSet.of_token_ids([[1] * PROMPT_TOKENS] * rows_per_step, teacher="main")
    with start_stubs(config, rates, sizes, prompts) as run:
        yield run


@contextmanager
def start_stubs(config: Config, rates: StubRates, sizes: StubSizes, prompts: PromptSet) -> Iterator[StubRun]:
    """Start pools of given sizes, one for each of the config's teachers, and a learner; a step asks each prompt."""
    rows_per_batch = config.rollout.rows_per_batch
    cluster = SharedProcesses(rates, rows_per_batch)
    settings = RolloutActorSettings(StudentConfig("stub"), EngineConfig(), 1, rows_per_batch, None)
    with ExitStack() as stack:
        stack.callback(cluster.end)
        rollouts = RolloutPool(settings, [{"num_cpus": 0}] * sizes.rollout, TIMEOUTS, cluster=cluster)
        pools = {
            name: start_pool(name, TeacherConfig("stub"), 1, [{"num_cpus": 0}] * size, TIMEOUTS, cluster)
            for name, size in sizes.teachers.items()
        }
        learner = LearnerGroup(config, [{"num_cpus": 0}], cluster)
        stack.callback(learner.shutdown)
        rollouts.wait_until_ready()
        for pool in pools.values():
            pool.wait_until_ready()
        rollouts.set_prompts(prompts)
        yield StubRun(config, rollouts, TeacherRouter(pools, TIMEOUTS.call_seconds), learner, len(prompts))


def overlap_rows(num_workers: int, steps: int) -> list[Row]:
    """Compare sequential, strictly on-policy streaming and staleness 1 on pools of balanced rates."""
    rows_per_step = num_workers * SEQUENCES_PER_WORKER
    rates = balanced_rates(rows_per_step, num_teachers=max(1, num_workers // 4))
    with stub_run(num_workers, rates, rows_per_step) as run:
        run.streaming(range(1))  # warms up
        seconds: dict[str, list[float]] = {"sequential": [], "strict streaming": [], "staleness 1": []}
        for turn in range(steps):
            at = range(1 + turn, 2 + turn)
            seconds["sequential"] += run.sequential(at)
            seconds["strict streaming"] += run.streaming(at)
        # Of a run that is ahead: its first step has nobody to run ahead of.
        seconds["staleness 1"] = run.streaming(range(1, 3 + steps), max_staleness=1)[1:-1]
        slowest = statistics.median(slowest_stage_seconds(run, 1 + turn, rates) for turn in range(steps))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    size = f"{num_workers} rollout workers"
    return [
        *(row(f"step, {name}", size, value, "s") for name, value in median.items()),
        at_least(
            row("sequential / strict streaming", size, median["sequential"] / median["strict streaming"], "ratio"), 1.5
        ),
        at_least(
            row("slowest stage alone / strict streaming", size, slowest / median["strict streaming"], "ratio"), 0.85
        ),
        row("sequential / staleness 1", size, median["sequential"] / median["staleness 1"], "ratio"),
    ]


def driver_rows(num_workers: int, steps: int) -> list[Row]:
    """Count trajectories per second when the engines take no time: what is left is Ray, Arrow and the driver."""
    at_once = num_workers * SEQUENCES_PER_WORKER
    seconds, cpu_seconds = {}, {}
    with stub_run(num_workers, INSTANT, max(TIMES_AT_ONCE) * at_once) as run:
        for times in TIMES_AT_ONCE:
            run.rows_per_step = times * at_once
            run.streaming(range(1))
            started = time.process_time()
            seconds[times] = statistics.median(run.streaming(range(1, 1 + steps)))
            cpu_seconds[times] = (time.process_time() - started) / steps
    size = f"{num_workers} rollout workers"
    most = max(TIMES_AT_ONCE)
    # The workers' processes share these cores; in a cluster they do not share the driver's.
    of_driver = row("driver, trajectories per CPU-second", size, at_once / cpu_seconds[1], "1/s")
    growth = row(
        f"driver, CPU-seconds per trajectory of a step with {most} times as many / of the step",
        size,
        cpu_seconds[most] / most / cpu_seconds[1],
        "ratio",
    )
    return [
        row("driver and all stages, trajectories", size, at_once / seconds[1], "1/s"),
        at_least(of_driver, 3000),
        at_most(growth, 1.1),
    ]


def balanced_rates(rows_per_step: int, num_teachers: int) -> StubRates:
    """Return rates at which scoring and learning alone take SCORE_SECONDS and LEARN_SECONDS of a mean step."""
    lengths = [completion_length(sampling_seed(0, 1, row), LONG_TAIL) + PROMPT_TOKENS for row in range(rows_per_step)]
    tokens = sum(lengths)
    return replace(
        LONG_TAIL,
        score_tokens_per_second=tokens / num_teachers / SCORE_SECONDS,
        learn_tokens_per_second=tokens / LEARN_SECONDS,
    )


def slowest_stage_seconds(run: StubRun, step: int, rates: StubRates) -> float:
    """Return the longest of: writing the step's longest completion, scoring its tokens, learning from them."""
    lengths = [completion_length(request.seed, rates) for request in run.requests(step)]
    tokens = sum(lengths) + PROMPT_TOKENS * len(lengths)
    num_teachers = max(1, len(lengths) // SEQUENCES_PER_WORKER // 4)
    score = tokens / num_teachers / rates.score_tokens_per_second
    return max(max(lengths) * rates.seconds_per_token, score, tokens / rates.learn_tokens_per_second)


PARTS: Mapping[str, Callable[[int, int], list[Row]]] = {"overlap": overlap_rows, "driver": driver_rows}


def main() -> None:
    """Run all sizes, print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.streaming", description=__doc__)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each case")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 8, 64, 256], help="sizes of the rollout pool")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/DATE-streaming.json")
    options = parser.parse_args()
    with local_cluster(num_cpus=4, include_dashboard=False, log_to_driver=False):
        rows = [
            found for part in options.parts for size in options.workers for found in PARTS[part](size, options.steps)
        ]
    print_rows(rows)
    output = options.output or RESULTS / f"{date.today():%Y-%m-%d}-streaming.json"
    chosen = (
        f"--workers {' '.join(map(str, options.workers))} --steps {options.steps} --parts {' '.join(options.parts)}"
    )
    write_rows(output, f"python -m benchmarks.cases.streaming {chosen}", rows)
    print(f"written: {output}")


if __name__ == "__main__":
    main()
