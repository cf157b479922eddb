"""Stub engines behind the real pools: they wait as long as hardware of given rates would, and compute nothing.

For questions about scheduling and scale only: how the stages overlap, what the driver costs. The pools, the actors'
handling of batches, Arrow, Ray and the driver's code are the real ones; models, vLLM and DeepSpeed are not there. Many
stub workers share a process, since they only wait.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
from ray.actor import ActorHandle

from cluster.actors.cluster import Arguments, Options, RayCluster
from cluster.actors.object_store import pack
from cluster.config.objective import ObjectiveConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.metrics import Metric, Sum
from cluster.contracts.pieces import Pieces
from cluster.contracts.protocols import RolloutEngine
from cluster.contracts.requests import Completion, RolloutRequest, SamplingSettings, ScoreRequest
from cluster.contracts.trajectory import add_scores, ragged
from cluster.contracts.wire import from_wire
from learner.batching.arrivals import RankShare
from learner.group import LEARNER_ACTOR
from rollout_workers.environments.base import Services
from rollout_workers.pool import ROLLOUT_ACTOR
from rollout_workers.prompts import PromptSet
from rollout_workers.worker import RolloutWorker
from teacher_workers.pool import TEACHER_ACTOR

WORKERS_PER_PROCESS = 32
TOKENS_AT_A_TIME = 4  # of engines that slow down with the sequences that run: more often, timers would cost too much


@dataclass(frozen=True)
class StubRates:
    """How fast the simulated hardware is."""

    seconds_per_token: float  # of each sequence, however many run together, if `seconds_per_running` is 0
    concurrent_sequences: int  # per rollout worker
    score_tokens_per_second: float  # per teacher worker
    learn_tokens_per_second: float  # per rank
    median_length: float  # completion lengths are log-normal
    sigma: float
    longest: int
    seconds_per_running: float = 0.0  # that each running sequence adds to the seconds of a token of all of them


def completion_length(seed: int, rates: StubRates) -> int:
    """Return how many tokens a stub writes for a seed."""
    drawn = rates.median_length * np.exp(rates.sigma * np.random.default_rng(seed).normal())
    return int(np.clip(drawn, 1, rates.longest))


class StubRolloutEngine:
    """Sleeps through completions; those of the lowest priority first when not all fit."""

    def __init__(self, rates: StubRates) -> None:
        self._rates = rates
        self._free = rates.concurrent_sequences
        self._waiting: asyncio.PriorityQueue[tuple[int, int, asyncio.Event]] = asyncio.PriorityQueue()
        self._arrivals = 0
        self._running: dict[asyncio.Event, int] = {}  # tokens still to write
        self._decoding: asyncio.Task[None] | None = None

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        """Write as many tokens as the seed says, at the rate of the simulated engine."""
        length = completion_length(seed, self._rates)
        if self._free:
            self._free -= 1
        else:
            turn = asyncio.Event()
            self._arrivals += 1
            self._waiting.put_nowait((priority, self._arrivals, turn))
            await turn.wait()
        await self._write(length)
        if self._waiting.empty():
            self._free += 1
        else:
            self._waiting.get_nowait()[2].set()
        zeros = np.zeros(length, np.int32)
        return Completion(zeros, zeros.astype(np.float32), "stop", policy_versions=zeros)

    async def shutdown(self) -> None:
        """End nothing."""

    async def _write(self, length: int) -> None:
        if not self._rates.seconds_per_running:
            await asyncio.sleep(length * self._rates.seconds_per_token)
            return
        if self._decoding is None or self._decoding.done():
            self._decoding = asyncio.create_task(self._decode())
        done = asyncio.Event()
        self._running[done] = length
        await done.wait()

    async def _decode(self) -> None:
        """Write some tokens of every running sequence at a time, each as slowly as their number makes it."""
        now = time.perf_counter()
        while self._running:
            rates = self._rates
            now += TOKENS_AT_A_TIME * (rates.seconds_per_token + rates.seconds_per_running * len(self._running))
            await asyncio.sleep(max(0.0, now - time.perf_counter()))
            for done in list(self._running):
                self._running[done] -= TOKENS_AT_A_TIME
                if self._running[done] <= 0:
                    del self._running[done]
                    done.set()
            await asyncio.sleep(0)  # those that waited for a place take it now


class StubRolloutProcess:
    """Hosts stub rollout workers; every method of RolloutActor that training calls, with the worker's index first."""

    def __init__(self, rates: StubRates, rows_per_batch: int) -> None:
        self._rates, self._rows_per_batch = rates, rows_per_batch
        self._workers: dict[int, RolloutWorker] = {}
        self._rollouts: dict[tuple[int, int], Any] = {}

    async def start(self, worker: int) -> None:
        """Build a worker."""
        engine = cast(RolloutEngine, StubRolloutEngine(self._rates))  # but for the weights, which never change
        self._workers[worker] = RolloutWorker(engine, Services(lambda text: [], lambda ids: ""), self._rows_per_batch)

    async def set_prompts(self, worker: int, wire: pa.Buffer) -> None:
        """Replace the prompts."""
        self._workers[worker].set_prompts(PromptSet.from_wire(wire))

    async def start_rollout(
        self,
        worker: int,
        call: int,
        requests: Sequence[RolloutRequest],
        sampling: SamplingSettings,
        priority: int,
    ) -> tuple[Pieces, BatchHandle]:
        """Begin a rollout and return its first batch."""
        self._rollouts[worker, call] = self._workers[worker].generate(requests, sampling, priority)
        return await self.next_batch(worker, call)

    async def next_batch(self, worker: int, call: int) -> tuple[Pieces, BatchHandle]:
        """Return the rollout's next batch."""
        rows, metrics, is_last = await anext(self._rollouts[worker, call])
        wire, handle = pack(rows, metrics)
        return wire, replace(handle, is_last=is_last)

    async def shutdown(self, worker: int) -> None:
        """End a worker's verifier."""
        await self._workers[worker].shutdown()


class StubTeacherProcess:
    """Hosts stub teacher workers, each of which reads one batch after the other."""

    def __init__(self, rates: StubRates) -> None:
        self._rates = rates
        self._turns: dict[int, asyncio.Lock] = {}

    async def start(self, worker: int) -> None:
        """Build a worker."""
        self._turns[worker] = asyncio.Lock()

    async def score(self, worker: int, wire: pa.Buffer, request: ScoreRequest) -> tuple[Pieces, BatchHandle]:
        """Score every token as the student did."""
        batch = from_wire(wire)
        num_tokens = int(ragged(batch, "token_ids").offsets[-1])
        async with self._turns[worker]:
            await asyncio.sleep(num_tokens / self._rates.score_tokens_per_second)
        scores = {"logprobs": np.array(ragged(batch, "rollout_logprobs").values)}
        return pack(add_scores(batch, request.model, scores), {"teacher/scored_tokens": Sum(float(num_tokens))})

    async def shutdown(self, worker: int) -> None:
        """End nothing."""


class StubLearnerActor:
    """A rank that waits as long as forward and backward would take."""

    def __init__(self, rates: StubRates) -> None:
        self._rates = rates

    def address(self) -> str:
        """Return where the group would meet."""
        return "nowhere"

    def start(self, address: str) -> None:
        """Load nothing."""

    def accumulate(
        self, share: RankShare, completes_step: bool, objective: ObjectiveConfig | None
    ) -> dict[str, Metric]:
        """Wait for one round."""
        started = time.perf_counter()
        batches = [from_wire(wire, "scored") for wire in ray.get(list(share.references))]
        lengths = [int(length) for batch in batches for length in ragged(batch, "token_ids").lengths]
        tokens = sum(lengths[index] for grid in share.grids for row in grid for index in row)
        time.sleep(tokens / self._rates.learn_tokens_per_second)
        return {"tokens": Sum(float(tokens)), "busy_seconds": Sum(time.perf_counter() - started)}

    def take_step(self, num_tokens: int, step: int) -> dict[str, Metric]:
        """Change nothing."""
        return {"busy_seconds": Sum(0.0)}

    def shutdown(self) -> None:
        """End nothing."""


class _Method:
    """One method of one worker inside a shared process, called as Ray's actor methods are."""

    def __init__(self, method: Any, worker: int) -> None:
        self._method, self._worker = method, worker

    def options(self, **options: Any) -> "_Method":
        return _Method(self._method.options(**options), self._worker)

    def remote(self, *arguments: Any) -> Any:
        return self._method.remote(self._worker, *arguments)


class SharedWorker:
    """Stands for one worker of a process as an actor handle does."""

    def __init__(self, process: ActorHandle, worker: int) -> None:
        self._process, self._worker = process, worker

    def __getattr__(self, method: str) -> _Method:
        """Return a method that names this worker to the process."""
        return _Method(getattr(self._process, method), self._worker)


class StubCluster(RayCluster):
    """Makes stubs in place of the run's actors, each in a process of its own.

    Args:
        rates: of the stubs.
        rows_per_batch: of the rollout workers.
        rollout, teacher: the stubs' classes.
    """

    def __init__(
        self,
        rates: StubRates,
        rows_per_batch: int,
        rollout: str = "benchmarks.harness.stub_pools:StubRolloutProcess",
        teacher: str = "benchmarks.harness.stub_pools:StubTeacherProcess",
    ) -> None:
        super().__init__()
        self._stubs: dict[str, tuple[str, tuple[Any, ...]]] = {  # class, and its constructor's arguments
            ROLLOUT_ACTOR: (rollout, (rates, rows_per_batch)),
            TEACHER_ACTOR: (teacher, (rates,)),
            LEARNER_ACTOR: ("benchmarks.harness.stub_pools:StubLearnerActor", (rates,)),
        }

    def create(self, actor_class: str, names: Sequence[str], arguments: Arguments, options: Options) -> list[Any]:
        """Return one handle per name; `arguments` are those of the real actors, which the stubs do not need."""
        stub, own = self._stubs[actor_class]
        return super().create(stub, names, [own] * len(names), options)


class SharedProcesses(StubCluster):
    """Makes the workers of each pool in few processes, and ends them; the learner's ranks have their own.

    Args:
        rates: of the stubs.
        rows_per_batch: of the rollout workers.
    """

    def __init__(self, rates: StubRates, rows_per_batch: int) -> None:
        super().__init__(rates, rows_per_batch)
        self._processes: list[ActorHandle] = []

    def create(self, actor_class: str, names: Sequence[str], arguments: Arguments, options: Options) -> list[Any]:
        """Return one handle per name."""
        if actor_class == LEARNER_ACTOR:
            return super().create(actor_class, names, arguments, options)
        count = -(-len(names) // WORKERS_PER_PROCESS)
        option = {**options[0], "num_cpus": 0, "max_concurrency": 4 * WORKERS_PER_PROCESS}
        labels = [f"stub-{names[0]}-process-{index}" for index in range(count)]
        processes = super().create(actor_class, labels, [()] * count, [option] * count)
        self._processes += processes
        return [SharedWorker(processes[index % count], index) for index in range(len(names))]

    def end(self) -> None:
        """End the processes."""
        for process in self._processes:
            ray.kill(process)
