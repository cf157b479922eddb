"""Stub engines with a process each, which can start and end while the pools run: `SharedProcesses` cannot."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pyarrow as pa

from benchmarks.cases.streaming import TIMEOUTS, StubRun
from benchmarks.harness.stub_pools import StubCluster, StubRates, StubRolloutProcess, StubTeacherProcess
from benchmarks.harness.workloads import PROMPT_TOKENS, Split, Workload
from cluster.config.sections import StudentConfig
from cluster.config.stages import EngineConfig, TeacherConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.pieces import Pieces
from cluster.contracts.requests import RolloutRequest, SamplingSettings, ScoreRequest
from learner.group import LearnerGroup
from rollout_workers.pool import RolloutActorSettings, RolloutPool
from rollout_workers.prompts import PromptSet
from teacher_workers.pool import start_pool
from teacher_workers.router import TeacherRouter


class StubRolloutActor:
    """One stub rollout worker."""

    def __init__(self, rates: StubRates, rows_per_batch: int) -> None:
        self._process = StubRolloutProcess(rates, rows_per_batch)

    async def start(self) -> None:
        """Build the worker."""
        await self._process.start(0)

    async def set_prompts(self, wire: pa.Buffer) -> None:
        """Replace the prompts."""
        await self._process.set_prompts(0, wire)

    async def start_rollout(
        self, call: int, requests: Sequence[RolloutRequest], sampling: SamplingSettings, priority: int
    ) -> tuple[Pieces, BatchHandle]:
        """Begin a rollout and return its first batch."""
        return await self._process.start_rollout(0, call, requests, sampling, priority)

    async def next_batch(self, call: int) -> tuple[Pieces, BatchHandle]:
        """Return the rollout's next batch."""
        return await self._process.next_batch(0, call)

    async def shutdown(self) -> None:
        """End the worker's verifier."""
        await self._process.shutdown(0)


class StubTeacherActor:
    """One stub teacher worker."""

    def __init__(self, rates: StubRates) -> None:
        self._process = StubTeacherProcess(rates)

    async def start(self) -> None:
        """Build the worker."""
        await self._process.start(0)

    async def score(self, wire: pa.Buffer, request: ScoreRequest) -> tuple[Pieces, BatchHandle]:
        """Score every token as the student did."""
        return await self._process.score(0, wire, request)

    async def shutdown(self) -> None:
        """End nothing."""


@contextmanager
def stub_process_run(workload: Workload, split: Split) -> Iterator[StubRun]:
    """Start a workload's pools; Ray must run."""
    config, rates, options = workload.config, workload.rates, {"num_cpus": 0}
    rows_per_batch = config.rollout.rows_per_batch
    cluster = StubCluster(
        rates,
        rows_per_batch,
        "benchmarks.harness.stub_processes:StubRolloutActor",
        "benchmarks.harness.stub_processes:StubTeacherActor",
    )
    settings = RolloutActorSettings(StudentConfig("stub"), EngineConfig(), 1, rows_per_batch, None)
    prompts = PromptSet.join([PromptSet.of_token_ids([[1] * PROMPT_TOKENS], name) for name in workload.routes])
    with ExitStack() as stack:
        rollouts = RolloutPool(settings, [options] * split.rollout, TIMEOUTS, cluster=cluster)
        stack.callback(rollouts.shutdown)
        pools = {}
        for name, size in split.teachers.items():
            pools[name] = start_pool(name, TeacherConfig("stub"), 1, [options] * size, TIMEOUTS, cluster)
            stack.callback(pools[name].shutdown)
        learner = LearnerGroup(config, [options], cluster)
        stack.callback(learner.shutdown)
        rollouts.wait_until_ready()
        for pool in pools.values():
            pool.wait_until_ready()
        rollouts.set_prompts(prompts)
        yield StubRun(config, rollouts, TeacherRouter(pools, TIMEOUTS.call_seconds), learner, len(prompts))
