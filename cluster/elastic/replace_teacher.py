"""Replaces a teacher's checkpoint while the run goes on: `preceptor teacher RUN replace math models/math-2`.

A step is scored by one checkpoint of each teacher: those that were asked for before the switch by the old one, later
ones by the new. The new workers start where there is room beside the old, and take over at the first step that is
asked for when one of them serves and was audited. Where there is room for none, they take the old ones' places: from
the next step on scoring waits for them, or for the first of them where the old ones are several and one leaves early.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal
from uuid import uuid4

import msgspec

from cluster.actors.replicas import unplanned_options
from cluster.config.run_config import Config
from cluster.config.run_directory import ControlFiles
from cluster.config.stages import TeacherConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import ActorError, ConfigError, ModelError, PreceptorError
from cluster.contracts.files import Record
from cluster.elastic.control_files import ANSWER_SECONDS, ControlRequests, Message, ask_driver
from cluster.elastic.teacher_log import TeacherLog, TeacherVersion, with_models
from cluster.models.aligned_states import check_states
from cluster.models.model_checks import ModelFacts, read_model
from cluster.models.pairs import align, by_role, compare, excluding, merging
from cluster.placement.capacity import missing_for
from cluster.placement.gpu_sharing import with_gpus
from cluster.placement.placement import PoolPlacement
from cluster.run.hooks import RunContext, StepHook
from cluster.run.inputs import Inputs, check_support
from cluster.run.pools import Pipeline, start_teachers
from teacher_workers.audit.runner import ScoreAudit
from teacher_workers.backends.base import find_backend
from teacher_workers.pool import TeacherPool, TeacherReplicas
from teacher_workers.replacement import Replacement


class ReplaceRequest(Message, frozen=True, forbid_unknown_fields=True):
    """Requests another checkpoint of a teacher."""

    teacher: str
    model: str


class ReplaceResponse(Message, frozen=True, forbid_unknown_fields=True):
    """Answers a ReplaceRequest."""

    sentence: str  # what will happen, or why nothing will
    is_granted: bool


def start_replacement(config: Config, inputs: Inputs, pipeline: Pipeline, name: str) -> Replacement:
    """Begin to start, where there is room, as many workers of a teacher as serve it now; its slot moves with it.

    `config` has the teacher's new model.
    """
    current = pipeline.teachers.pools[name].replicas
    label = f"{current.label.partition('@')[0]}@{uuid4().hex[:6]}"  # Ray may hold a dead actor's name for a while
    teachers = replacing_sections(config, pipeline, current)
    options = [unplanned_options(pipeline.placement.teachers[name].share)] * max(1, current.size)
    pools = start_teachers(config, inputs, label, teachers, options, pipeline.supervision)
    for pool in pools.values():
        pool.checkpoint = find_backend(pool.teacher).identity(pool.teacher)
    return Replacement(pools)


def replacing_sections(config: Config, pipeline: Pipeline, current: TeacherReplicas) -> dict[str, TeacherConfig]:
    """Return the new teachers' sections: as many engines as now, with the same parts of a GPU that all share."""
    placed = with_gpus(config, pipeline.placement.on_gpu).teachers
    return {name: msgspec.structs.replace(placed[name], num_workers=current.size) for name in current.teachers}


def current_config(config: Config, pipeline: Pipeline) -> Config:
    """Return a run's configuration with the models that score now."""
    return _as_served(config, pipeline.teachers.pools)


def _as_served(config: Config, pools: Mapping[str, TeacherPool]) -> Config:
    served = {
        name: msgspec.structs.replace(
            config.teachers[name],
            model=pool.teacher.model,
            excluded_token_ids=pool.teacher.excluded_token_ids,
            stop_class=pool.teacher.stop_class,
        )
        for name, pool in pools.items()
    }
    return msgspec.structs.replace(config, teachers={**config.teachers, **served})


class TeacherChanges(StepHook):
    """Starts the requested teachers in the driver, and lets them take over between two steps."""

    def __init__(
        self,
        run: RunContext,
        audit: ScoreAudit,
        start: Callable[[Config, Inputs, Pipeline, str], Replacement] = start_replacement,
        missing: Callable[[tuple[PoolPlacement, int]], str | None] = missing_for,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Note which checkpoints score from the step after `run.first_step` on."""
        super().__init__(run)
        self._audit, self._start, self._missing, self._clock = audit, start, missing, clock
        self._pipeline, self._say = run.pipeline, run.view.say
        self._finished_step = run.first_step
        self._requests = ControlRequests(run.directory.replacing, clock)
        self._log = TeacherLog(run.directory.teachers, run.first_step)
        for name in run.pipeline.teachers.pools:
            self._note(name, run.first_step, "configuration")

    def while_waiting(self) -> None:
        """Read a request for another checkpoint, and give up replacements that cannot serve."""
        for replacement in list(self._pipeline.teachers.replacements):
            error = replacement.error or self._overdue(replacement)
            if error is not None:
                self._cancel(replacement, error)
        request = self._requests.take(ReplaceRequest)
        if request is None:
            return
        try:
            sentence, is_granted = self._begin(request.teacher, request.model), True
        except PreceptorError as error:
            sentence, is_granted = str(error), False
        self._requests.answer(ReplaceResponse(request.request_id, sentence, is_granted))
        self._say(sentence)

    def before_step(self, step: int) -> None:
        """Let the replacements that can serve take over, from a step (from 0) that nothing was requested for yet."""
        for replacement in list(self._pipeline.teachers.replacements):
            if replacement.error is None and (replacement.replicas.serving or replacement.waits_for_place):
                self._switch(replacement, step)
        # A teacher that takes another's place can start when that one has left, and this step's scores wait for it.
        self._pipeline.teachers.close(next_step=self._finished_step)

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        self._finished_step = step
        self._pipeline.teachers.close(next_step=step)
        return {}

    def _begin(self, name: str, model: str) -> str:
        """Check the model, begin to start its workers, and say what will happen; an error has changed nothing."""
        config = self._checked(name, model)
        teachers = self._pipeline.teachers
        current = teachers.pools[name].replicas
        lack = self._missing((self._pipeline.placement.teachers[name], 1))
        several = current.size > 1
        replacement = self._start(config, self.run.inputs, self._pipeline, name)
        replacement.waits_for_place = not current.size or (lack is not None and not several)
        replacement.num_borrowed = int(lack is not None and several)
        replacement.due = self._clock() + config.ray.start_timeout_seconds
        teachers.prepare(replacement)
        if not current.size:
            return f"teacher {name}: {model} takes its place at the next step, and has no worker yet either"
        if lack is None:
            return f"teacher {name}: {model} starts, and scores from the first step that is asked for when it serves"
        if several:
            current.resize(current.size - 1)
            return f"teacher {name}: {lack}, so one worker leaves for the first of {model}, which then takes over"
        return f"teacher {name}: {lack}, so {model} takes its place at the next step, whose scores wait for it"

    def _checked(self, name: str, model: str) -> Config:
        """Return the current configuration with the model, after all checks that need no engine."""
        teachers, config = self._pipeline.teachers, current_config(self.run.config, self._pipeline)
        if name not in teachers.pools:
            raise ConfigError(
                f"there is no teacher {name!r}; this run has {', '.join(teachers.pools)}, and its prompts name no other"
            )
        if config.teachers[name].source is not None:
            raise ConfigError(f"teacher {name} is the student itself (from = 'student'), which no other model replaces")
        if any(name in replacement.pools for replacement in teachers.replacements):
            raise ConfigError(f"teacher {name} is being replaced already; wait until the new one has taken over")
        config = with_models(config, {name: model})
        backend, student = find_backend(config.teachers[name]), read_model(config.student, is_student=True)
        facts = backend.check(config.teachers[name], student)
        if backend.identity(config.teachers[name]) == teachers.pools[name].checkpoint:
            raise ConfigError(f"teacher {name} is {model} already, with these very files")
        self._check_context_length(name, model, facts)
        if config.teachers[name].is_aligned:
            return self._checked_map(name, config, student, facts)
        pair = compare(name, config.teachers[name], student, facts, config.rollout.stop_token_ids)
        if facts.tokenizer.eos_token_id not in student.stops.union(config.rollout.stop_token_ids):
            raise ModelError(
                f"model '{model}': its EOS is {facts.tokenizer.eos_token!r}, at which the completions of this run do "
                "not end; start a new run with it"
            )
        check_support(config, facts.vocabulary)
        check_states(config, student, {name: facts})
        written, stop_class = self.run.config.teachers[name].excluded_token_ids, config.rollout.stop_class or ()
        stop_class = (*stop_class, *sorted(pair.own_stop_ids)) if stop_class else ()
        section = merging(excluding(config.teachers[name], pair.excluded_ids), stop_class, written)
        return msgspec.structs.replace(config, teachers={**config.teachers, name: section})

    def _check_context_length(self, name: str, model: str, facts: ModelFacts) -> None:
        needed = self.run.inputs.scoring_model_len(name)
        if facts.context_tokens < needed:
            raise ModelError(
                f"model '{model}': its context is {facts.context_tokens} tokens, and this run needs {needed}"
            )

    def _checked_map(self, name: str, config: Config, student: ModelFacts, facts: ModelFacts) -> Config:
        """Return the configuration if an aligned teacher's tokens are those that its prompts were written in."""
        teacher, began_with = config.teachers[name], self.run.config.teachers[name].alignment
        if began_with is None or align(name, config, student, facts)[0].digest != began_with.digest:
            raise ModelError(
                f"model '{teacher.model}': its tokens are not those of teacher {name}, in which it reads "
                "this run's prompts; start a new run with it"
            )
        section = msgspec.structs.replace(teacher, stop_class=by_role(facts) if len(facts.stops) > 1 else ())
        return msgspec.structs.replace(config, teachers={**config.teachers, name: section})

    def _switch(self, replacement: Replacement, step: int) -> None:
        teachers = self._pipeline.teachers
        models = {name: pool.teacher.model for name, pool in replacement.pools.items()}
        config = _as_served(current_config(self.run.config, self._pipeline), replacement.pools)
        try:
            for pool in replacement.pools.values():
                # Once more, for a hub id's files are there now.
                pool.checkpoint = find_backend(pool.teacher).identity(pool.teacher)
            new_audit = self._audit.for_replacement(config, replacement.pools)
            new_audit.begin(step)
            for fault in new_audit.finish():
                self._say(fault.sentence)
        except PreceptorError as error:
            self._cancel(replacement, error)
            return
        self._audit.adopt(new_audit)
        changed = self._changed(replacement)
        teachers.switch(replacement, step)
        self._pipeline.learner.replace_teachers(config.teachers, first_step=step)
        for name in changed:
            self._note(name, step, "replacement")
        said = ", ".join(f"teacher {name} is {models[name]}" for name in changed)
        self._say(f"{said} from step {step + 1} on")

    def _overdue(self, replacement: Replacement) -> PreceptorError | None:
        """Return why a replacement is given up that waits too long for its place."""
        if replacement.waits_for_place or replacement.replicas.serving or self._clock() <= replacement.due:
            return None
        limit = self.run.config.ray.start_timeout_seconds
        return ActorError(f"none of the new workers served within {limit:.0f} s; make room, and ask for it again")

    def _cancel(self, replacement: Replacement, error: PreceptorError) -> None:
        changed = self._changed(replacement)
        self._pipeline.teachers.cancel(replacement)
        self._say(f"teacher {', '.join(changed)} stays as it is: {error}")

    def _changed(self, replacement: Replacement) -> list[str]:
        """Return the teachers with another checkpoint than now; those of its slot only move."""
        pools = self._pipeline.teachers.pools
        return [name for name, pool in replacement.pools.items() if pool.checkpoint != pools[name].checkpoint]

    def _note(self, name: str, step: int, by: Literal["configuration", "replacement"]) -> None:
        pool = self._pipeline.teachers.pools[name]
        self._log.note(TeacherVersion(step + 1, name, pool.teacher.model, pool.checkpoint, by))


def ask_to_replace(files: ControlFiles, teacher: str, model: str, timeout_seconds: float = ANSWER_SECONDS) -> str:
    """Ask a running driver to replace a teacher, and return what it will do; raise ConfigError if it refuses."""
    answer = ask_driver(files, ReplaceRequest(uuid4().hex, teacher, model), ReplaceResponse, timeout_seconds)
    if not answer.is_granted:
        raise ConfigError(answer.sentence)
    return answer.sentence
