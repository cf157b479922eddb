"""Pools, learner and prompts of the soak: the real ones, made of actors that wait (benchmarks/soak/actors.py)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from ray.actor import ActorHandle

from benchmarks.soak.actors import Delays
from cluster.actors.cluster import PoolTimeouts, RayCluster
from cluster.config.run_config import Config
from cluster.config.run_file import parse_run_config
from cluster.config.sections import StudentConfig
from cluster.config.stages import EngineConfig
from cluster.run.inputs import Inputs
from learner.group import LEARNER_ACTOR, LearnerGroup
from rollout_workers.pool import ROLLOUT_ACTOR, RolloutActorSettings, RolloutPool
from rollout_workers.prompts import PromptOrder, PromptSet
from teacher_workers.pool import TEACHER_ACTOR, start_pool
from teacher_workers.router import TeacherRouter

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
    teachers: TeacherRouter
    learner: LearnerGroup
    ranks: Sequence[ActorHandle]  # of `learner`


class WaitingCluster(RayCluster):
    """Makes actors that wait, and passes each the delays, and its number to those of a pool."""

    def __init__(self, delays: Delays) -> None:
        super().__init__(
            {
                ROLLOUT_ACTOR: "benchmarks.soak.actors:WaitingRolloutActor",
                TEACHER_ACTOR: "benchmarks.soak.actors:WaitingTeacherActor",
                LEARNER_ACTOR: "benchmarks.soak.learner:WaitingLearnerActor",
            }
        )
        self._delays = delays
        self.ranks: list[ActorHandle] = []

    def create(self, actor_class: str, names: Sequence[str], arguments: Sequence[Any], options: Sequence[Any]) -> Any:
        """Begin to start one actor per name."""
        if actor_class == LEARNER_ACTOR:
            self.ranks = super().create(actor_class, names, [(*own, self._delays) for own in arguments], options)
            return self.ranks
        with_delays = [(*own, self._delays, index) for index, own in enumerate(arguments)]
        return super().create(actor_class, names, with_delays, options)


@contextmanager
def soak_pools(delays: Delays) -> Iterator[SoakPools]:
    """Start waiting rollout workers, two teachers with two workers each, and two learner ranks."""
    config = parse_run_config(RUN)
    timeouts = PoolTimeouts(config.ray.start_timeout_seconds, WAIT_SECONDS)
    cluster = WaitingCluster(delays)
    with ExitStack() as stack:
        settings = RolloutActorSettings(
            StudentConfig("stub"), EngineConfig(), 1, config.rollout.rows_per_batch, config.weight_sync.transport
        )
        of_rollouts, of_teachers = [NO_CPU] * NUM_ROLLOUT_WORKERS, [NO_CPU] * NUM_TEACHER_WORKERS
        rollouts = RolloutPool(settings, of_rollouts, timeouts, cluster=cluster)
        stack.callback(rollouts.shutdown)
        teachers = TeacherRouter(
            {
                name: start_pool(name, teacher, 1, of_teachers, timeouts, cluster)
                for name, teacher in config.teachers.items()
            },
            WAIT_SECONDS,
        )
        stack.callback(teachers.shutdown)
        learner = LearnerGroup(config, [NO_CPU] * config.learner.num_workers, cluster)
        stack.callback(learner.shutdown)
        rollouts.wait_until_ready()
        for pool in teachers.pools.values():
            pool.wait_until_ready()
        inputs = _inputs(config)
        rollouts.set_prompts(inputs.prompts)
        yield SoakPools(config, inputs, rollouts, teachers, learner, cluster.ranks)


def _inputs(config: Config) -> Inputs:
    """Return prompts of which each teacher has half."""
    token_ids = [[1] * PROMPT_TOKENS] * (NUM_PROMPTS // len(config.teachers))
    prompts = PromptSet.join([PromptSet.of_token_ids(token_ids, teacher) for teacher in config.teachers])
    return Inputs(prompts, PromptOrder(len(prompts), config.run.seed, shuffle=True), (), max_model_len=1)
