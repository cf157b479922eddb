"""Starts the pools of a run, all at once, and ends them with every process of theirs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from cluster.actors.cluster import PoolTimeouts, RayCluster
from cluster.actors.liveness import Watch
from cluster.actors.replicas import Supervision
from cluster.actors.restarts import RestartLimit
from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.config.sections import StudentConfig
from cluster.config.stages import TeacherConfig
from cluster.models.model_files import load_tokenizer
from cluster.placement.gpu_sharing import with_gpus
from cluster.placement.placement import Placement, PoolPlacement
from cluster.run.inputs import Inputs
from learner.group import LearnerGroup
from rollout_workers.contexts.plan import prompts_with_contexts
from rollout_workers.pool import RolloutActorSettings, RolloutPool
from teacher_workers.backends.base import find_backend
from teacher_workers.pool import TeacherPool, start_pool
from teacher_workers.replacement import ReplaceableTeachers
from teacher_workers.time_sharing import start_slot


@dataclass(frozen=True)
class Pipeline:
    """Holds the running pools."""

    rollouts: RolloutPool
    teachers: ReplaceableTeachers
    learner: LearnerGroup
    placement: Placement
    supervision: Supervision  # of the pools' workers
    start_seconds: float = 0.0  # which the pools took to start


@contextmanager
def start_pipeline(
    config: Config,
    inputs: Inputs,
    placement: Placement,
    learner_config: Config | None = None,
    before_teachers: Callable[[], None] = lambda: None,
) -> Iterator[Pipeline]:
    """Start all pools; with the `with` statement, they and every process of theirs end.

    Args:
        learner_config: replaces `config` for the learner, for checks against other teachers.
        before_teachers: is called while the rollout workers start and the teachers' resources are still free.
    """
    began = perf_counter()
    config = with_gpus(config, placement.on_gpu)
    with ExitStack() as stack:
        watch = stack.enter_context(closing(Watch(config.ray.silence_seconds)))
        limit = RestartLimit(config.ray.max_restarts, config.ray.restart_window_seconds)
        supervision = Supervision(limit, watch)
        rollouts = RolloutPool(
            _rollout_settings(config, inputs),
            placement.rollout.options(),
            pool_timeouts(config),
            cluster=run_cluster(config),
            supervision=supervision,
            spare=placement.rollout.share,
        )
        stack.callback(rollouts.shutdown)
        before_teachers()
        teachers: dict[str, TeacherPool] = {}
        for label, names in config.scorer_groups.items():
            share = placement.teachers[names[0]]
            sections = {name: config.teachers[name] for name in names}
            options = share.options() or [share.share]
            teachers |= start_teachers(config, inputs, label, sections, options, supervision)
        teachers = {name: teachers[name] for name in config.teachers}
        pools = ReplaceableTeachers(teachers, config.ray.call_timeout_seconds)
        stack.callback(pools.shutdown)
        # Blocks until the ranks have met; the engines load their models meanwhile.
        learners = config if learner_config is None else with_gpus(learner_config, placement.on_gpu)
        learner = LearnerGroup(learners, placement.learner.options(), run_cluster(config))
        stack.callback(learner.shutdown)
        rollouts.wait_until_ready()
        for teacher in teachers.values():
            teacher.wait_until_ready()
            # Now, for a hub id's files are there when an engine has read them.
            teacher.checkpoint = find_backend(teacher.teacher).identity(teacher.teacher)
        rollouts.set_prompts(inputs.prompts)
        yield Pipeline(rollouts, pools, learner, placement, supervision, start_seconds=perf_counter() - began)


def start_student_as_teacher(mirrored: Config, inputs: Inputs, placement: PoolPlacement, name: str) -> TeacherPool:
    """Begin to start replicas of the student that a mirrored run has for a teacher; a dead one ends the run.

    They are called student-as-teacher-0, ...: Ray may hold the names of the real teachers for a while after their end.
    """
    teacher = with_gpus(mirrored, placement.gpus_per_worker > 0).teachers[name]
    label, timeouts = "student-as-teacher", pool_timeouts(mirrored)
    options, cluster = placement.options(), run_cluster(mirrored)
    return start_pool(name, teacher, inputs.max_model_len, options, timeouts, cluster, label=label)


def start_teachers(
    config: Config,
    inputs: Inputs,
    label: str,
    teachers: Mapping[str, TeacherConfig],
    options: Sequence[Mapping[str, Any]],
    supervision: Supervision,
) -> dict[str, TeacherPool]:
    """Begin to start the replicas of one of `config.scorer_groups`, and return the pools of its teachers."""
    max_model_len, timeouts, cluster = inputs.scoring_model_len(*teachers), pool_timeouts(config), run_cluster(config)
    if len(teachers) > 1:
        return start_slot(label, teachers, max_model_len, options, timeouts, cluster, supervision)
    return {
        name: start_pool(name, teacher, max_model_len, options, timeouts, cluster, supervision, label)
        for name, teacher in teachers.items()
    }


def start_student_rollouts(config: Config, inputs: Inputs, placement: Placement) -> AbstractContextManager[RolloutPool]:
    """Start generators of the student as its files are, without a learner."""
    settings = _rollout_settings(with_gpus(config, placement.on_gpu), inputs)
    return _start_rollouts(config, inputs, settings, placement.rollout, "rollout")


def start_teacher_rollouts(
    config: Config, inputs: Inputs, placement: Placement, name: str
) -> AbstractContextManager[RolloutPool]:
    """Start generators of one teacher, on the resources of its replicas, to let it answer prompts itself."""
    teacher = with_gpus(config, placement.on_gpu).teachers[name]
    student = StudentConfig(teacher.model, teacher.trust_remote_code)
    settings = replace(
        _rollout_settings(config, inputs),
        student=student,
        engine=teacher.engine,
        sampled_candidates=False,
        merges_stops=False,
        float32_head=False,
        contexts=None,
        privileged=None,
        max_model_len=inputs.scoring_model_len(name),
    )
    tokenizer = load_tokenizer(config.student.model, config.student.trust_remote_code)
    own = prompts_with_contexts(inputs.contexts, name, inputs.prompts, inputs.held_out_ids, tokenizer)
    return _start_rollouts(
        config, replace(inputs, prompts=own or inputs.prompts), settings, placement.teachers[name], f"rollout-of-{name}"
    )


@contextmanager
def _start_rollouts(
    config: Config, inputs: Inputs, settings: RolloutActorSettings, placement: PoolPlacement, name: str
) -> Iterator[RolloutPool]:
    settings = replace(settings, weight_transport=None)
    pool = RolloutPool(settings, placement.options(), pool_timeouts(config), name, run_cluster(config))
    try:
        pool.wait_until_ready()
        pool.set_prompts(inputs.prompts)
        yield pool
    finally:
        pool.shutdown()


def _rollout_settings(config: Config, inputs: Inputs) -> RolloutActorSettings:
    return RolloutActorSettings(
        config.student,
        config.rollout.engine,
        inputs.rollout_model_len(config),
        config.rollout.rows_per_batch,
        config.weight_sync.transport,
        environment=config.environment,
        sampled_candidates=config.objective.needs.sampled_candidates,
        merges_stops=len(config.rollout.stop_class or ()) > 1,
        keeps_cache=config.rollout.keep_cache_on_update,
        float32_head=config.rollout.engine.dtype != "float32" and config.learner.head_dtype != "bfloat16",
        contexts=inputs.contexts,
        chat=(config.student, config.prompts, inputs.read_at)
        if config.environment.has_turns and config.prompts.template == "chat"
        else None,
        # Strictly on-policy, new weights are the next thing that follows a step's rollouts.
        rests=config.rollout.engine.sleep and config.rollout.max_staleness == 0,
        privileged=inputs.privileged.settings,
    )


def pool_timeouts(config: Config) -> PoolTimeouts:
    """Return how long the driver waits for the actors of the pools."""
    return PoolTimeouts(config.ray.start_timeout_seconds, config.ray.call_timeout_seconds)


def run_cluster(config: Config) -> RayCluster:
    """Return what starts a run's actors, and keeps in the run's folder what failed ones have printed."""
    return RayCluster(logs=RunDirectory(Path(config.run.directory) / config.run.name).logs)
