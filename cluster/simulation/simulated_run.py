"""Runs steps in simulated time: the real flow, permits, pools and learner group over workers that only take time."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import mean

import msgspec
import numpy as np

from cluster.actors.cluster import PoolTimeouts
from cluster.config.run_config import Config
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from cluster.run.driver import Permits
from cluster.run.flow import Flow, StepBatches
from cluster.simulation.rates import Rates, sample_lengths
from cluster.simulation.simulated_cluster import SimulatedCluster, SimulatedTime
from cluster.simulation.simulated_workers import (
    LearnerClock,
    SimulatedRank,
    SimulatedRolloutWorker,
    SimulatedTeacherWorker,
    Trajectory,
)
from learner.group import LEARNER_ACTOR, LearnerGroup
from rollout_workers.pool import ROLLOUT_ACTOR, RolloutActorSettings, RolloutPool
from teacher_workers.pool import TEACHER_ACTOR, start_pool
from teacher_workers.router import TeacherRouter

GOLDEN_RATIO = 0.618033988749895  # multiples of it, modulo 1, fill [0, 1) evenly
STEPS_AT_ONCE = 8  # whose lengths are sampled together: their mean is close to the distribution's


class Demand:
    """Samples the trajectories of some steps when the first of them is requested, from the run's seed alone."""

    def __init__(self, config: Config, rates: Rates, num_prompts: int | None = None) -> None:
        self._config, self._rates, self._num_prompts = config, rates, num_prompts
        self._rows_per_step = config.prompts.prompts_per_step * config.rollout.samples_per_prompt
        self._steps: dict[int, list[Trajectory]] = {}
        shares = [rates.teachers[name].share for name in config.routes]
        self._until = [share / sum(shares) for share in accumulate(shares)]

    def requests(self, step: int) -> list[RolloutRequest]:
        samples = self._config.rollout.samples_per_prompt
        return [
            RolloutRequest(row.trajectory_id, row.prompt_id, index % samples, seed=0)
            for index, row in enumerate(self._trajectories(step))
        ]

    def trajectory(self, request: RolloutRequest) -> Trajectory:
        """Return the trajectory that answers a request."""
        step, index = divmod(request.trajectory_id, self._rows_per_step)
        return self._trajectories(step)[index]

    def tokens_per_step(self) -> tuple[float, float]:
        """Return the mean prompt and completion tokens of a step."""
        rows = [row for step in range(STEPS_AT_ONCE) for row in self._trajectories(step)]
        tokens = sum(row.prompt_tokens for row in rows), sum(row.completion_tokens for row in rows)
        return tokens[0] / STEPS_AT_ONCE, tokens[1] / STEPS_AT_ONCE

    def _trajectories(self, step: int) -> list[Trajectory]:
        if step not in self._steps:
            self._sample(step // STEPS_AT_ONCE)
        return self._steps[step]

    def _sample(self, block: int) -> None:
        random = np.random.default_rng([self._config.run.seed, block])
        num_prompts, num_rows = self._config.prompts.prompts_per_step, self._rows_per_step
        prompts = sample_lengths(self._rates.rollout.prompt_tokens, STEPS_AT_ONCE * num_prompts, random)
        completions = sample_lengths(self._rates.rollout.completion_tokens, STEPS_AT_ONCE * num_rows, random)
        for index in range(STEPS_AT_ONCE):
            step = block * STEPS_AT_ONCE + index
            of_step = slice(index * num_prompts, (index + 1) * num_prompts)
            self._steps[step] = self._step(step, prompts[of_step], completions[index * num_rows :][:num_rows])

    def _step(self, step: int, prompts: Sequence[int], completions: Sequence[int]) -> list[Trajectory]:
        samples, longest = self._config.rollout.samples_per_prompt, self._config.rollout.max_completion_tokens
        trajectories = []
        for index, length in enumerate(completions):
            prompt = step * len(prompts) + index // samples
            prompt_id = prompt % self._num_prompts if self._num_prompts else prompt
            teacher = self._teacher(prompt_id)
            trajectory_id, prompt_tokens = step * self._rows_per_step + index, prompts[index // samples]
            trajectories.append(Trajectory(trajectory_id, prompt_id, prompt_tokens, min(length, longest), teacher))
        return trajectories

    def _teacher(self, prompt_id: int) -> str:
        position = (prompt_id * GOLDEN_RATIO) % 1.0
        routes = self._config.routes
        return next((name for name, until in zip(routes, self._until, strict=True) if position < until), routes[-1])


NO_LIMIT = PoolTimeouts(start_seconds=1e9, call_seconds=1e9)  # simulated actors answer, sooner or later


@dataclass(frozen=True)
class Split:
    """Counts the workers of each pool.

    Example:
        >>> str(Split(6, {"main": 2}, 1))
        'rollout=6 teachers.main=2 learner=1'
    """

    rollout: int
    teachers: Mapping[str, int]
    learner: int

    @property
    def sizes(self) -> dict[str, int]:
        """Return the workers of each pool, by its name on the command line."""
        teachers = {f"teachers.{name}": size for name, size in self.teachers.items()}
        return {"rollout": self.rollout, **teachers, "learner": self.learner}

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.sizes.items())


@dataclass(frozen=True)
class Prediction:
    """Predicts the steps of a split."""

    split: Split
    step_seconds: tuple[float, ...]
    completion_tokens_per_second: float
    idle_shares: Mapping[str, float]  # by the pools' names on the command line; mean over their workers

    @property
    def mean_step_seconds(self) -> float:
        return mean(self.step_seconds)


@dataclass
class SimulatedRun:
    """Drives simulated pools of one split."""

    config: Config
    time: SimulatedTime
    rollouts: RolloutPool
    teachers: TeacherRouter
    learner: LearnerGroup
    busy_seconds: Callable[[], Mapping[str, float]]  # of each pool's workers together

    def steps(self, demand: Demand, num_steps: int) -> tuple[list[float], dict[str, float]]:
        """Do steps as the driver does, and return the seconds of each, and how long each pool's workers were busy.

        Those before the first for which generation has run ahead as far as it may are left out of both.
        """
        max_staleness = self.config.rollout.max_staleness
        rollout = self.config.rollout
        sampling = SamplingSettings(rollout.max_completion_tokens, rollout.temperature)
        flow = Flow(self.rollouts, self.teachers, NO_LIMIT.call_seconds)
        first, after = max_staleness + 1, max_staleness + 1 + num_steps
        permits = Permits(0, after + max_staleness, max_staleness)  # of a run that goes on
        under_way: dict[int, StepBatches] = {}
        seconds: list[float] = []
        busy_before: Mapping[str, float] = {}
        for step in range(after):
            if step == first:
                busy_before = self.busy_seconds()
            began = self.time.now
            for admitted in permits.admit(step):
                requests = demand.requests(admitted)
                under_way[admitted] = flow.admit(admitted, requests, sampling, self.config.scorers)
            self.learner.step(under_way.pop(step), step)
            self.learner.publish_weights(self.rollouts.actors, policy_version=step + 1)
            seconds.append(self.time.now - began)
        busy = {name: value - busy_before[name] for name, value in self.busy_seconds().items()}
        return seconds[first:], busy


def simulate(config: Config, rates: Rates, split: Split, demand: Demand, num_steps: int) -> Prediction:
    """Predict what a split does, from some steps of a run that is well under way."""
    seconds, busy = build(config, rates, split, demand).steps(demand, num_steps)
    whole = sum(seconds)
    idle = {name: max(0.0, 1 - busy[name] / size / whole) for name, size in split.sizes.items()}
    first = config.rollout.max_staleness + 1
    tokens = sum(
        demand.trajectory(request).completion_tokens
        for step in range(first, first + num_steps)
        for request in demand.requests(step)
    )
    return Prediction(split, tuple(seconds), tokens / whole, idle)


def build(config: Config, rates: Rates, split: Split, demand: Demand) -> SimulatedRun:
    """Make the real pools and the real group over simulated workers."""
    time = SimulatedTime()
    learner_clock = LearnerClock(time, rates.learner, split.learner, rates.sync_seconds)
    cluster = SimulatedCluster(
        time,
        rates.seconds_per_call,
        {
            ROLLOUT_ACTOR: lambda _name, settings: SimulatedRolloutWorker(
                time, rates.rollout, settings, demand.trajectory
            ),
            TEACHER_ACTOR: lambda name, _name, teacher, _max_model_len: SimulatedTeacherWorker(
                time, rates.teachers[_pool_of(name).removeprefix("teacher-")], teacher.engine.max_batched_tokens
            ),
            LEARNER_ACTOR: lambda *_: SimulatedRank(learner_clock),
        },
    )
    settings = RolloutActorSettings(config.student, config.rollout.engine, 1, config.rollout.rows_per_batch, None)
    rollouts = RolloutPool(settings, [{}] * split.rollout, NO_LIMIT, cluster=cluster)
    pools = {
        name: start_pool(name, config.teachers[name], 1, [{}] * size, NO_LIMIT, cluster)
        for name, size in split.teachers.items()
    }
    ranks = msgspec.structs.replace(config.learner, num_workers=split.learner)
    learner = LearnerGroup(msgspec.structs.replace(config, learner=ranks), [{}] * split.learner, cluster)
    rollouts.wait_until_ready()
    for pool in pools.values():
        pool.wait_until_ready()

    def busy_seconds() -> Mapping[str, float]:
        busy: defaultdict[str, float] = defaultdict(float)
        for name, worker in cluster.workers.items():
            busy[_pool_of(name).replace("teacher-", "teachers.", 1)] += worker.busy_seconds
        return busy

    return SimulatedRun(config, time, rollouts, TeacherRouter(pools, NO_LIMIT.call_seconds), learner, busy_seconds)


def _pool_of(actor_name: str) -> str:
    return actor_name.rpartition("-")[0]
