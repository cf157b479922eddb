"""Five workloads over stub engines, small enough to be measured on two cores, and the pools that run them.

Each has a number of replicas that may be rollout workers or teacher workers; how many of which is best differs from one
to the next, and none of them says so.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product

from benchmarks.cases.streaming import StubRun, StubSizes, start_stubs
from benchmarks.harness.stub_pools import StubRates
from cluster.config.run_config import Config
from cluster.config.run_file import parse_run_config
from rollout_workers.prompts import PromptSet

PROMPT_TOKENS = 8


@dataclass(frozen=True)
class Split:
    """How a workload's replicas are shared out.

    Example:
        >>> str(Split(6, {"main": 2}))
        'rollout=6 teachers.main=2'
    """

    rollout: int
    teachers: Mapping[str, int]

    def __str__(self) -> str:
        """Write it as `preceptor scale` takes it."""
        return " ".join([f"rollout={self.rollout}", *(f"teachers.{name}={n}" for name, n in self.teachers.items())])


@dataclass(frozen=True)
class Workload:
    """What is asked of which hardware."""

    name: str
    rates: StubRates
    num_replicas: int  # to share out between the rollout pool and the teachers' pools
    rows_per_step: int
    max_staleness: int = 0
    teachers: Mapping[str, int] = field(default_factory=lambda: {"main": 1})  # name -> rows for it, of so many in all

    @property
    def splits(self) -> list[Split]:
        """Return every way to share the replicas out, at least one to each pool."""
        sizes = range(1, self.num_replicas)
        return [
            Split(self.num_replicas - sum(of_teachers), dict(zip(self.teachers, of_teachers, strict=True)))
            for of_teachers in product(sizes, repeat=len(self.teachers))
            if sum(of_teachers) < self.num_replicas
        ]

    @property
    def routes(self) -> list[str]:
        """Return the teacher of each of a step's rows, mixed."""
        pattern = [name for name, share in self.teachers.items() for _ in range(share)]
        return [pattern[row % len(pattern)] for row in range(self.rows_per_step)]

    @property
    def config(self) -> Config:
        """Return the run's configuration."""
        teachers = "".join(f'teachers.{name}.model = "stub"\n' for name in self.teachers)
        text = f'student.model = "stub"\n{teachers}prompts.train = "stub"\n'
        overrides = {
            "objective": "thinking-machines",
            "learner.micro_batch_tokens": 4096,
            "prompts.prompts_per_step": self.rows_per_step,
            "rollout.max_staleness": self.max_staleness,
            "rollout.max_completion_tokens": self.rates.longest,
            "rollout.engine.max_concurrent_sequences": self.rates.concurrent_sequences,
        }
        return parse_run_config(text, [f"{name}={value}" for name, value in overrides.items()])


WORKLOADS = (
    Workload(  # a sequence is written more slowly the more run beside it
        "rollout-bound, crowded engines",
        StubRates(4e-3, 16, 6000, 8000, median_length=120, sigma=0.3, longest=300, seconds_per_running=5e-4),
        num_replicas=8,
        rows_per_step=64,
    ),
    Workload(
        "teacher-bound",
        StubRates(4e-3, 16, 900, 8000, median_length=120, sigma=0.3, longest=300),
        num_replicas=8,
        rows_per_step=64,
    ),
    Workload(
        "balanced long tail",
        StubRates(5e-3, 8, 2500, 8000, median_length=100, sigma=0.8, longest=400),
        num_replicas=8,
        rows_per_step=64,
    ),
    Workload(
        "two unequal teachers",
        StubRates(5e-3, 8, 1500, 8000, median_length=100, sigma=0.5, longest=300),
        num_replicas=8,
        rows_per_step=64,
        teachers={"math": 3, "code": 1},
    ),
    Workload(
        "long tail, staleness 1",
        StubRates(5e-3, 8, 1500, 8000, median_length=100, sigma=0.8, longest=400),
        num_replicas=8,
        rows_per_step=64,
        max_staleness=1,
    ),
)


@contextmanager
def running(workload: Workload, split: Split) -> Iterator[StubRun]:
    """Start a workload's pools; Ray must run."""
    prompts = PromptSet.join([PromptSet.of_token_ids([[1] * PROMPT_TOKENS], teacher) for teacher in workload.routes])
    sizes = StubSizes(split.rollout, split.teachers)
    with start_stubs(workload.config, workload.rates, sizes, prompts) as run:
        yield run
