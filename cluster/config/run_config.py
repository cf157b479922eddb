"""Defines the one run configuration: frozen typed sections in data-flow order, and the rules between them.

`run_file.py` reads it from TOML. Fields are documented where they stand.
"""

from typing import Annotated

from msgspec import Meta, field

from cluster.config.alarms import AlarmConfig
from cluster.config.aligned import check_aligned
from cluster.config.fields import Section, Text
from cluster.config.objective import ObjectiveConfig
from cluster.config.replay import check_replay
from cluster.config.samplers import check_gentleness, check_sampling_teacher
from cluster.config.sections import (
    HARNESS_KINDS,
    CheckpointConfig,
    EnvironmentConfig,
    EvaluationConfig,
    LoggingConfig,
    PromptsConfig,
    RayConfig,
    RunConfig,
    ScoreAuditConfig,
    StudentConfig,
)
from cluster.config.stages import (
    ROLLOUT_ENGINES,
    BalanceConfig,
    LearnerConfig,
    RefreshConfig,
    RolloutConfig,
    TeacherConfig,
    WeightSyncConfig,
)
from cluster.config.terms import (
    BASE,
    INITIAL_STUDENT,
    OF_GROUP,
    TEACHER,
    CrossEntropyTerm,
    DivergenceTerm,
    PolicyGradientTerm,
    RepresentationTerm,
)
from cluster.contracts.requests import ScoreRequest

REASONING_GYM, VERIFIERS = "reasoning-gym:", "verifiers:"  # before the task, in the place of a file
MAX_COMPLETIONS_PER_STEP = 10_000_000  # the driver keeps a request of each


class Config(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Holds the settings of a whole run."""

    method: Text | None = None  # a name of methods.py; whatever else is written overrides it
    run: RunConfig = RunConfig()
    student: StudentConfig
    prompts: PromptsConfig
    environment: EnvironmentConfig = EnvironmentConfig()
    rollout: RolloutConfig = RolloutConfig()
    teachers: Annotated[dict[str, TeacherConfig], Meta(min_length=1)]
    objective: ObjectiveConfig = ObjectiveConfig()
    learner: LearnerConfig = LearnerConfig()
    balance: BalanceConfig = BalanceConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    score_audit: ScoreAuditConfig = ScoreAuditConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    alarms: dict[str, AlarmConfig] = field(default_factory=dict)  # the reader adds the default ones
    logging: LoggingConfig = LoggingConfig()
    ray: RayConfig = RayConfig()

    def __post_init__(self) -> None:
        _check_targets(self)
        _check_shares(self)
        _check_self_teachers(self)
        _check_slots(self)
        _check_balance(self)
        _check_sampling(self.objective, self.rollout)
        check_aligned(self)
        check_replay(self)
        rollout = self.rollout
        completions = self.prompts.prompts_per_step * rollout.samples_per_prompt
        if completions > MAX_COMPLETIONS_PER_STEP:
            raise ValueError(
                f"prompts.prompts_per_step times rollout.samples_per_prompt is {completions}; "
                f"a step takes up to {MAX_COMPLETIONS_PER_STEP} completions"
            )
        sleepers = [name for name, teacher in self.teachers.items() if teacher.engine.sleep]
        if sleepers:
            raise ValueError(f"teachers.{sleepers[0]}.engine.sleep is set, but only rollout engines sleep by it")
        if not rollout.engine.tensor_parallel:
            raise ValueError("rollout.engine.tensor_parallel is 0; every rollout worker on a GPU needs one or more")
        if rollout.engine.quantization is not None:
            raise ValueError(
                f"rollout.engine.quantization is '{rollout.engine.quantization}', but a student gets new weights "
                "after every step, in its own dtype; only teachers are quantised"
            )
        _check_prompts(self)
        _check_tools(self)
        _check_packages(self.prompts, self.environment)
        _check_contexts(self)
        check_gentleness(self)
        check_sampling_teacher(self)
        self.objective.check_privileged(has_sampler=self.rollout.privileged is not None)

    @property
    def routes(self) -> list[str]:
        """Return the teachers that prompts may name: all but those beside another, in a target or to write."""
        beside = {teacher.base for teacher in self.teachers.values()} | {*self.objective.needs.models, INITIAL_STUDENT}
        beside.add(self.sampling_teacher)
        return [name for name in self.teachers if name not in beside or name == TEACHER] or list(self.teachers)

    @property
    def sampling_teacher(self) -> str | None:
        """Return the [teachers.NAME] that writes for prompts that the student never solves; None: no teacher does."""
        return None if self.rollout.privileged is None else self.rollout.privileged.sampler

    @property
    def scorer_groups(self) -> dict[str, list[str]]:
        """Return the teachers by the pool of workers that scores for them: their own, or their slot's."""
        groups: dict[str, list[str]] = {}
        for name, teacher in self.teachers.items():
            label = f"teacher-{name}" if teacher.slot is None else f"slot-{teacher.slot}"
            groups.setdefault(label, []).append(name)
        return groups

    def scorers(self, route: str) -> list[tuple[str, ScoreRequest]]:
        """Return who scores a batch of this route, in order, and what is asked of each: [teachers.NAME], request.

        The routed teacher comes first, since the others may have to score tokens that it chose.
        """
        needs = self.objective.needs
        scorers = []
        for model in needs.models:
            chooses = model == TEACHER and needs.candidates_from == "teacher"
            teacher = self.teachers[self.scoring_teacher(model, route)]
            request = ScoreRequest(
                model=model,
                top_k=needs.num_candidates if chooses else 0,
                given_candidates=bool(needs.num_candidates) and not chooses,
                entropy=model == TEACHER and needs.teacher_entropy,
                hidden=needs.hidden or model in needs.last_states,
                layers=model in needs.layer_states,
                aligned=teacher.is_aligned,
                further=teacher.signals,
                compared_rows=0.0 if teacher.context is None else teacher.context.compared_rows,
            )
            scorers.append((self.scoring_teacher(model, route), request))
        return scorers

    @property
    def reads_columns(self) -> bool:
        """Return whether further columns of the prompts may be read: by code of the user's, or by a context."""
        return self.environment.reads_columns or self.has_contexts

    @property
    def has_contexts(self) -> bool:
        """Return whether a teacher, or a privileged sampler, reads more of a prompt's row than the student."""
        return self.rollout.privileged is not None or any(t.context is not None for t in self.teachers.values())

    def scoring_teacher(self, model: str, route: str) -> str:
        """Return which [teachers.NAME] a target's model is for rows of this route."""
        if model == TEACHER:
            return route
        return (self.teachers[route].base or route) if model == BASE else model


def _check_prompts(config: Config) -> None:
    """Check that the settings of prompts and rewards do not exclude each other."""
    prompts, environment = config.prompts, config.environment
    for name in ("system_prompt", "chat_template_kwargs") if prompts.template == "raw" else ():
        if getattr(prompts, name) not in (None, {}):
            raise ValueError(f"prompts.{name} is set, but prompts.template = 'raw' has no place for it")
    if environment.rewards and environment.verifier != "exact":
        raise ValueError(
            f"environment.rewards takes the place of environment.verifier; put '{environment.verifier}' among them"
        )


def _check_tools(config: Config) -> None:
    """Check that tools go with the environment and the prompts."""
    prompts, environment = config.prompts, config.environment
    if environment.kind == "tools" and not environment.tools:
        raise ValueError("environment.kind = 'tools' has no tools; name functions in environment.tools")
    if environment.tools and not environment.has_turns:
        raise ValueError("environment.tools are for several turns; set environment.kind = 'tools'")
    if environment.tools and (prompts.template == "raw" or prompts.last_answer == "prefill"):
        raise ValueError(
            "environment.tools are written by the chat template, after whole messages; set prompts.template = 'chat' "
            "and no prompts.last_answer = 'prefill'"
        )


def _check_packages(prompts: PromptsConfig, environment: EnvironmentConfig) -> None:
    """Check that what a package rewards and plays are its own prompts."""
    for source in filter(None, (prompts.train, prompts.held_out)):
        if "reasoning_gym" in (environment.rewards or (environment.verifier,)) and not source.startswith(REASONING_GYM):
            raise ValueError(
                f"environment: 'reasoning_gym' rewards the prompts of that package, and '{source}' are others; "
                f"set prompts.train and prompts.held_out to '{REASONING_GYM}TASK'"
            )
        if (environment.kind == "verifiers") != source.startswith(VERIFIERS):
            raise ValueError(
                f"environment.kind is '{environment.kind}' and the prompts are '{source}'; an environment of verifiers "
                f"plays its own tasks: set kind = 'verifiers', and the prompts to '{VERIFIERS}TASKSET'"
            )
    if environment.kind in HARNESS_KINDS and prompts.template == "raw":
        raise ValueError(f"environment.kind = '{environment.kind}' asks by messages; set prompts.template = 'chat'")


def _check_contexts(config: Config) -> None:
    for name, teacher in config.teachers.items():
        if teacher.shuffled_context and teacher.context is None:
            raise ValueError(f"teachers.{name}: shuffled_context = true, but there is no context to shuffle; set one")


def _check_sampling(objective: ObjectiveConfig, rollout: RolloutConfig) -> None:
    """Check that the objective can make up for how the rollout workers sample."""
    cuts = (rollout.top_p, rollout.top_k) != (1.0, 0)
    advice = f"set rollout.top_p = 1 and rollout.top_k = 0, found {rollout.top_p} and {rollout.top_k}"
    if cuts and objective.needs.candidates_from == "student":
        raise ValueError(
            f"objective.support = '{objective.support}' compares tokens of the student's whole distribution; {advice}"
        )
    for name, term in objective.terms.items():
        if term.when in OF_GROUP and rollout.samples_per_prompt < 2:
            raise ValueError(
                f"objective.terms.{name}: when = '{term.when}' compares the samples of a prompt, and "
                "rollout.samples_per_prompt is 1; set it to 2 or more, or take 'reward_positive'"
            )
        has_residual = isinstance(term, DivergenceTerm) and term.has_residual and not objective.needs.hidden
        if cuts and (has_residual or not isinstance(term, DivergenceTerm | CrossEntropyTerm | RepresentationTerm)):
            kind = "the residual of a divergence" if has_residual else f"a {term.__struct_config__.tag}"
            raise ValueError(
                f"objective.terms.{name}: {kind} learns from the sampled tokens, and top_p and top_k keep some from "
                f"being sampled at all, for which no ratio makes up; {advice}"
                + (", or residual = false" if has_residual else "")
            )
        has_old_returns = isinstance(term, PolicyGradientTerm) and term.discount and term.student == "rollout"
        if has_old_returns and rollout.temperature != 1:
            raise ValueError(
                f"objective.terms.{name}: later advantages of student = 'rollout' need the sampler's probabilities at "
                f"temperature 1; set rollout.temperature = 1, found {rollout.temperature}, or student = 'current'"
            )


def _check_targets(config: Config) -> None:
    """Check that every model of every target is a teacher of the run."""
    if BASE in config.teachers:
        raise ValueError("teachers.base: the name 'base' means another teacher's base in targets; give it another name")
    _check_bases(config.teachers)
    for model in config.objective.needs.models:
        if model == BASE:
            without = [route for route in config.routes if config.teachers[route].base is None]
            if without:
                raise ValueError(f"teachers.{without[0]}: the objective's target has the model 'base', so set its base")
        elif model != TEACHER and model not in config.teachers:
            raise ValueError(
                f"objective: a target has the model '{model}'; expected teacher, base, initial_student or one of "
                f"{sorted(config.teachers)}"
            )


def _check_shares(config: Config) -> None:
    """Check that the shares of teachers, where they are given, are those of the teachers that prompts go to."""
    shares = config.objective.token_weights.teacher_shares
    if isinstance(shares, dict) and shares.keys() != set(config.routes):
        raise ValueError(
            f"objective.token_weights.teacher_shares names {sorted(shares)}; expected all teachers that prompts go to, "
            f"{sorted(config.routes)}"
        )


def _check_bases(teachers: dict[str, TeacherConfig]) -> None:
    for name, teacher in teachers.items():
        if teacher.base == name:
            raise ValueError(f"teachers.{name}.base names the teacher itself; name the model that it was trained from")
        if teacher.base is not None and teacher.base not in teachers:
            raise ValueError(f"teachers.{name}.base is '{teacher.base}'; there are {sorted(teachers)}")


def _check_self_teachers(config: Config) -> None:
    """Check that what is said to be the student can be, and can take its weights when it is to."""
    for name, teacher in config.teachers.items():
        if teacher.source is None and teacher.is_refreshed:
            raise ValueError(f"teachers.{name}.refresh is for teachers that are the student; set from = 'student'")
        if teacher.source is not None and teacher.url is not None:
            raise ValueError(f"teachers.{name}: from = 'student' is served by workers of the run; remove url")
        if teacher.source is not None and teacher.model != config.student.model:
            raise ValueError(
                f"teachers.{name}: model is '{teacher.model}', but from = 'student' makes it '{config.student.model}'; "
                "remove one of the two"
            )
        if teacher.backend == ROLLOUT_ENGINES and config.rollout.engine.sleep:
            raise ValueError(
                f"teachers.{name}: backend = '{ROLLOUT_ENGINES}' scores when the rollout engines have written; set "
                "rollout.engine.sleep = false"
            )
        if teacher.is_refreshed and (reason := _why_not_refreshed(config, teacher)):
            raise ValueError(f"teachers.{name}.refresh: {reason}, or leave it 'frozen'")


def _why_not_refreshed(config: Config, teacher: TeacherConfig) -> str | None:
    """Say what keeps a teacher from taking the student's weights during the run, and how to change it."""
    if teacher.slot is not None:
        return "the engines of a slot take no weights while they sleep; remove slot"
    if teacher.engine.quantization is not None:
        return f"new weights come in the engine's dtype, not in {teacher.engine.quantization}; remove quantization"
    if config.objective.needs.hidden and config.rollout.max_staleness:
        return (
            "the objective multiplies hidden states by the teacher's LM head, and rows of one step may be of several "
            "versions of it; set rollout.max_staleness = 0, or an objective.support other than 'full'"
        )
    is_gated = isinstance(teacher.refresh, RefreshConfig) and teacher.refresh.gate is not None
    if is_gated and (config.prompts.held_out is None or not config.evaluation.every_steps):
        return "its gate reads evaluations; set prompts.held_out and evaluation.every_steps"
    return None


def _check_slots(config: Config) -> None:
    """Check that the teachers of a slot ask for the same workers, which are theirs together."""
    for first, *others in config.scorer_groups.values():
        teacher = config.teachers[first]
        workers, gpus = teacher.num_workers, teacher.engine.tensor_parallel
        for name in others:
            other = config.teachers[name]
            if (other.num_workers, other.engine.tensor_parallel) != (workers, gpus):
                raise ValueError(
                    f"teachers.{name}: num_workers and engine.tensor_parallel are {other.num_workers} and "
                    f"{other.engine.tensor_parallel}, but {workers} and {gpus} of teachers.{first}, which has the same "
                    "slot; they share the workers"
                )


def _check_balance(config: Config) -> None:
    """Check that the balancer can move the workers of every pool."""
    if config.balance.mode == "off":
        return
    for name, teacher in config.teachers.items():
        if teacher.slot is not None or not teacher.num_workers:
            setting = "num_workers = 0" if teacher.slot is None else f"slot = '{teacher.slot}'"
            raise ValueError(
                f"teachers.{name}: {setting} cannot be balanced; give it workers of its own or turn balance off"
            )
    if config.ray.share_gpu:
        raise ValueError("ray.share_gpu leaves nothing to balance; turn balance off")
