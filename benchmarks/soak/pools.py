"""Pools, learner and prompts of the soak: the real ones, made of actors that wait (benchmarks/soak/actors.py)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.actor import ActorHandle

from benchmarks.soak.actors import Delays, WaitingRolloutActor, WaitingTeacherActor
from benchmarks.soak.learner import WaitingLearner
from cluster.actors.calls import PoolTimeouts, create_actors
from cluster.config.run_config import Config, StudentConfig
from cluster.config.run_file import parse_run_config
from cluster.config.stages import EngineConfig
from cluster.run.inputs import Inputs
from learner.group import LearnerGroup
from rollout_workers.actor import RolloutActorSettings
from rollout_workers.pool import RolloutPool
from rollout_workers.prompts import PromptOrder, PromptSet
from teacher_workers.pool import start_pool
from teacher_workers.router import TeacherPools

WAIT_SECONDS = 60.0  # the timeout of every wait; twenty times the longest delay
RUN = f"""
objective = "opd-grpo"                # a prompt's samples wait for each other at the learner
student.model = "stub"
teachers.left.model = "stub"
teachers.right.model = "stub"
prompts = {{ train = "stub", prompts_per_step = 16 }}
rollout = {{ samples_per_prompt = 2, rows_per_batch = 4, max_staleness = 2, max_completion_tokens = 400 }}
learner = {{ num_workers = 2, micro_batch_tokens = 2048 }}
weight_sync = {{ transport = "object_store", bucket_bytes = {1 << 17} }}  # two per update
ray = {{ start_timeout_seconds = 120.0, call_timeout_seconds = {WAIT_SECONDS} }}
"""
NUM_ROLLOUT_WORKERS, NUM_TEACHER_WORKERS = 3, 2  # the latter for each of the two teachers
NUM_PROMPTS, PROMPT_TOKENS = 100, 8
NO_CPU = {"num_cpus": 0}  # of Ray's accounting: waiting takes none


@dataclass(frozen=True)
class SoakPools:
    """The running pools."""

    config: Config
    inputs: Inputs
    rollouts: RolloutPool
    teachers: TeacherPools
    learner: LearnerGroup
    ranks: Sequence[ActorHandle]  # of `learner`


@contextmanager
def soak_pools(delays: Delays) -> Iterator[SoakPools]:
    """Start waiting rollout workers, two teachers with two workers each, and two learner ranks."""
    config = parse_run_config(RUN)
    timeouts = PoolTimeouts(config.ray.start_timeout_seconds, WAIT_SECONDS)
    create = partial(_create_waiting, delays)
    ranks: list[ActorHandle] = []

    def create_ranks(_: type, names: Sequence[str], arguments: Sequence[Any], options: Sequence[Any]) -> Any:
        with_delays = [(*argument, delays) for argument in arguments]
        ranks.extend(create_actors(WaitingLearner, names, with_delays, options))
        return ranks

    with ExitStack() as stack:
        settings = RolloutActorSettings(
            StudentConfig("stub"), EngineConfig(), 1, config.rollout.rows_per_batch, config.weight_sync.transport
        )
        of_rollouts, of_teachers = [NO_CPU] * NUM_ROLLOUT_WORKERS, [NO_CPU] * NUM_TEACHER_WORKERS
        rollouts = RolloutPool(settings, of_rollouts, timeouts, actor=WaitingRolloutActor, create=create)
        stack.callback(rollouts.shutdown)
        teachers = TeacherPools(
            {
                name: start_pool(name, teacher, 1, of_teachers, timeouts, actor=WaitingTeacherActor, create=create)
                for name, teacher in config.teachers.items()
            },
            WAIT_SECONDS,
        )
        stack.callback(teachers.shutdown)
        learner = LearnerGroup(config, [NO_CPU] * config.learner.num_workers, create=create_ranks)
        stack.callback(learner.shutdown)
        rollouts.wait_until_ready()
        for pool in teachers.pools.values():
            pool.wait_until_ready()
        inputs = _inputs(config)
        rollouts.set_prompts(inputs.prompts)
        yield SoakPools(config, inputs, rollouts, teachers, learner, ranks)


def _create_waiting(
    delays: Delays, cls: type, names: Sequence[str], arguments: Sequence[Any], options: Sequence[Any]
) -> list[ActorHandle]:
    """Make the actors of a pool as `create_actors` does, and tell each the delays and its number."""
    with_delays = [(*argument, delays, index) for index, argument in enumerate(arguments)]
    return create_actors(cls, names, with_delays, options)


def _inputs(config: Config) -> Inputs:
    """Return prompts of which each teacher has half."""
    token_ids = [[1] * PROMPT_TOKENS] * (NUM_PROMPTS // len(config.teachers))
    prompts = PromptSet.join([PromptSet.of_token_ids(token_ids, teacher) for teacher in config.teachers])
    return Inputs(prompts, PromptOrder(len(prompts), config.run.seed, shuffle=True), (), max_model_len=1)
