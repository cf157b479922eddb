"""Everything a run needs, read and started in the right order: inputs first, so that bad ones cost no start-up."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from cluster.audits.self_checks import check_tokenizers
from cluster.contracts.config import Config, StudentConfig
from cluster.contracts.errors import ConfigError
from cluster.contracts.interfaces import RolloutRequest, SamplingSettings
from cluster.ledger import AuditedRun
from cluster.models.model_checks import read_model
from cluster.nodes.gpu_shares import with_gpus
from cluster.nodes.placement import Placement, PoolPlacement
from cluster.workers.actors import PoolTimeouts
from cluster.workers.replicas import Supervision
from cluster.workers.restarts import RestartLimit
from cluster.workers.watch import Watch
from learner.group import LearnerGroup
from rollout_workers.actor import RolloutActorSettings
from rollout_workers.pool import RolloutPool
from rollout_workers.prompts import PromptOrder, PromptSet, load_prompts, sampling_seed
from teacher_workers.pool import TeacherPool
from teacher_workers.pools import TeacherPools
from teacher_workers.reference import fingerprint
from teacher_workers.scorers import Scorers

_TRAIN, _HELD_OUT = 0, 1  # keep the draws of training and evaluation apart


@dataclass(frozen=True)
class Inputs:
    """The prompts of a run: training prompts first, held-out ones after them, under one numbering."""

    prompts: PromptSet
    train: PromptOrder
    held_out_ids: tuple[int, ...]
    max_model_len: int  # longest prompt + completion + 1: the context that every engine must offer


@dataclass(frozen=True)
class Pipeline:
    """The running pools."""

    rollouts: RolloutPool
    teachers: TeacherPools
    learner: LearnerGroup
    placement: Placement
    supervision: Supervision  # of the pools' workers
    start_seconds: float = 0.0  # which the pools took to start


def load_inputs(config: Config) -> Inputs:
    """Read models' configurations, tokenizers and prompt files, and check that they fit each other.

    Raises:
        ModelError: a model is missing, or a teacher's tokenizer is not the student's.
        PromptError: a prompt file is missing, malformed, or has a prompt that does not fit a context.
    """
    student = read_model(config.student, is_student=True)
    teachers = {name: read_model(teacher, is_student=False) for name, teacher in config.teachers.items()}
    tokenizers = {name: facts.tokenizer for name, facts in teachers.items()}
    check_tokenizers(student.tokenizer, tokenizers, compare_templates=config.prompts.template == "chat")
    models = [student, *teachers.values()]
    check_support(config, min(model.vocabulary for model in models))
    context = min(model.context_tokens for model in models)
    train = load_prompts(Path(config.prompts.train), student.tokenizer, config, context)
    parts = [train]
    if config.prompts.held_out is not None:
        parts.append(load_prompts(Path(config.prompts.held_out), student.tokenizer, config, context))
    prompts = PromptSet.join(parts)
    return Inputs(
        prompts=prompts,
        train=PromptOrder(len(train), config.run.seed, config.prompts.shuffle),
        held_out_ids=tuple(range(len(train), len(prompts)))[: config.evaluation.num_prompts or None],
        max_model_len=prompts.longest_tokens + config.rollout.max_completion_tokens + 1,
    )


def check_support(config: Config, vocabulary: int) -> None:
    """Check that models with so many tokens have the candidates that the objective compares.

    Raises:
        ConfigError: they have not.
    """
    if config.objective.num_candidates > vocabulary:
        raise ConfigError(
            f"objective.support_size = {config.objective.support_size} is more than the {vocabulary} tokens of the "
            "models' vocabulary; lower it"
        )


def audited_run(config: Config, inputs: Inputs) -> AuditedRun:
    """Return what the run's ledger is held against."""
    return AuditedRun(
        prompts_per_step=config.prompts.prompts_per_step,
        samples_per_prompt=config.rollout.samples_per_prompt,
        max_staleness=config.rollout.max_staleness,
        take_prompts=inputs.train.take,
        requests=lambda step: train_requests(config, inputs, step),
    )


def train_requests(config: Config, inputs: Inputs, step: int) -> list[RolloutRequest]:
    """Return the completions that one step asks for: the same ones whenever the step is done again."""
    count, samples = config.prompts.prompts_per_step, config.rollout.samples_per_prompt
    first = step * count
    return [
        RolloutRequest(
            trajectory_id=(first + position) * samples + sample,
            prompt_id=prompt_id,
            sample_index=sample,
            seed=sampling_seed(config.run.seed, _TRAIN, step, prompt_id, sample),
        )
        for position, prompt_id in enumerate(inputs.train.take(first, count))
        for sample in range(samples)
    ]


def held_out_requests(config: Config, inputs: Inputs) -> list[RolloutRequest]:
    """Return the completions of one evaluation; every evaluation of a run asks for the same draws."""
    samples = config.evaluation.samples_per_prompt
    return [
        RolloutRequest(
            trajectory_id=position * samples + sample,
            prompt_id=prompt_id,
            sample_index=sample,
            seed=sampling_seed(config.run.seed, _HELD_OUT, 0, prompt_id, sample),
        )
        for position, prompt_id in enumerate(inputs.held_out_ids)
        for sample in range(samples)
    ]


def train_sampling(config: Config) -> SamplingSettings:
    """Return how training completions are drawn."""
    rollout, objective = config.rollout, config.objective
    return SamplingSettings(
        rollout.max_completion_tokens,
        rollout.temperature,
        rollout.top_p,
        rollout.top_k,
        rollout.stop,
        stop_repetition=rollout.stop_repetition,
        num_candidates=objective.num_candidates if objective.candidates_from == "student" else 0,
        candidates="draws" if objective.support == "samples" else "topk",
    )


def held_out_sampling(config: Config) -> SamplingSettings:
    """Return how held-out completions are drawn: from the model's own distribution, only the temperature set."""
    rollout = config.rollout
    return SamplingSettings(rollout.max_completion_tokens, config.evaluation.temperature, stop=rollout.stop)


@contextmanager
def start_pipeline(
    config: Config, inputs: Inputs, placement: Placement, learner_config: Config | None = None
) -> Iterator[Pipeline]:
    """Start all pools at once; with the `with` statement, they and every process of theirs end.

    Args:
        config: the run.
        inputs: its prompts.
        placement: where the actors go.
        learner_config: what the learner is told instead, for checks against other teachers.
    """
    began = perf_counter()
    config = with_gpus(config, placement.on_gpu)
    with ExitStack() as stack:
        watch = stack.enter_context(closing(Watch(config.ray.silence_seconds)))
        supervision = Supervision(restart_limit(config), watch)
        rollouts = RolloutPool(
            _rollout_settings(config, inputs),
            placement.rollout.options(),
            pool_timeouts(config),
            supervision=supervision,
        )
        stack.callback(rollouts.shutdown)
        teachers: dict[str, TeacherPool] = {}
        for label in config.scorer_groups:
            teachers |= start_scorers(config, inputs, placement, label, supervision)
        teachers = {name: teachers[name] for name in config.teachers}
        pools = TeacherPools(teachers, config.ray.call_timeout_seconds)
        stack.callback(pools.shutdown)
        # Blocks until the ranks have met; the engines load their models meanwhile.
        learners = config if learner_config is None else with_gpus(learner_config, placement.on_gpu)
        learner = LearnerGroup(learners, placement.learner.options())
        stack.callback(learner.shutdown)
        rollouts.wait_until_ready()
        for teacher in teachers.values():
            teacher.wait_until_ready()
            # Now, for a hub id's files are there when an engine has read them.
            teacher.checkpoint = fingerprint(teacher.teacher.model)
        rollouts.set_prompts(inputs.prompts)
        yield Pipeline(rollouts, pools, learner, placement, supervision, start_seconds=perf_counter() - began)


def start_student_as_teacher(mirrored: Config, inputs: Inputs, placement: PoolPlacement, name: str) -> TeacherPool:
    """Begin to start scorers of the student that a mirrored run has for a teacher; a dead one ends the run.

    They are called student-as-teacher-0, ...: Ray may hold the names of the real teachers for a while after their end.
    """
    teacher = with_gpus(mirrored, placement.gpus_per_worker > 0).teachers[name]
    scorers = Scorers("student-as-teacher", {name: teacher}, inputs.max_model_len, placement.options())
    return TeacherPool(name, scorers, pool_timeouts(mirrored))


def start_scorers(
    config: Config,
    inputs: Inputs,
    placement: Placement,
    label: str,
    supervision: Supervision,
) -> dict[str, TeacherPool]:
    """Begin to start the workers of one of `config.scorer_groups`, and return the pools of its teachers."""
    teachers = {name: config.teachers[name] for name in config.scorer_groups[label]}
    share = placement.teachers[next(iter(teachers))]
    options = share.options() or [share.share]
    scorers = Scorers(label, teachers, inputs.max_model_len, options, supervision=supervision)
    return {name: TeacherPool(name, scorers, pool_timeouts(config)) for name in teachers}


@contextmanager
def start_student_rollouts(config: Config, inputs: Inputs, placement: Placement) -> Iterator[RolloutPool]:
    """Start generators of the student as its files are, without a learner."""
    config = with_gpus(config, placement.on_gpu)
    settings = replace(_rollout_settings(config, inputs), weight_sync_backend=None)
    with _ready_rollouts(RolloutPool(settings, placement.rollout.options(), pool_timeouts(config)), inputs) as pool:
        yield pool


@contextmanager
def start_teacher_rollouts(config: Config, inputs: Inputs, placement: Placement, name: str) -> Iterator[RolloutPool]:
    """Start generators of one teacher, on the resources of its scorers, to let it answer prompts itself."""
    teacher = with_gpus(config, placement.on_gpu).teachers[name]
    settings = RolloutActorSettings(
        StudentConfig(teacher.model, teacher.trust_remote_code),
        teacher.engine,
        inputs.max_model_len,
        config.rollout.rows_per_batch,
        weight_sync_backend=None,
    )
    pool = RolloutPool(settings, placement.teachers[name].options(), pool_timeouts(config), f"rollout-of-{name}")
    with _ready_rollouts(pool, inputs):
        yield pool


@contextmanager
def _ready_rollouts(pool: RolloutPool, inputs: Inputs) -> Iterator[RolloutPool]:
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
        inputs.max_model_len,
        config.rollout.rows_per_batch,
        config.weight_sync.backend,
        draws=config.objective.support == "samples",
    )


def restart_limit(config: Config) -> RestartLimit:
    """Return how often each worker, and the learner, may be started again."""
    return RestartLimit(config.ray.max_restarts, config.ray.restart_window_seconds)


def pool_timeouts(config: Config) -> PoolTimeouts:
    """Return how long the driver waits for the actors of the pools."""
    return PoolTimeouts(config.ray.start_timeout_seconds, config.ray.call_timeout_seconds)
