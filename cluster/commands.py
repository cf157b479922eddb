"""Does what each command of the command line names, from a configuration to the last line that it prints."""

from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import CheckpointError
from cluster.elastic.balancer import make_balancer
from cluster.elastic.replace_teacher import TeacherChanges, current_config
from cluster.elastic.scale import make_scaling
from cluster.elastic.teacher_log import in_force
from cluster.models.model_files import load_tokenizer
from cluster.monitoring.run_lock import run_lock
from cluster.monitoring.sinks import TerminalView, terminal_view
from cluster.monitoring.status_file import KeptStatus
from cluster.monitoring.trackers import check_trackers
from cluster.nodes.interruption import stop_on_signals
from cluster.nodes.ray_session import RaySession, ray_session
from cluster.placement.placement import Placement, await_placement, describe
from cluster.placement.proposal import warning_of_dtype
from cluster.run.checkpoints import Checkpoints, RunState, StepEnd, find_resume_point
from cluster.run.evaluation import Evaluation, Evaluations, Evaluator, write_samples
from cluster.run.hooks import RunContext, StepHook, load_hooks
from cluster.run.inputs import Inputs, load_inputs
from cluster.run.kept_rows import KeptRows
from cluster.run.memory import cluster_gpu, memory_plan, with_memory_plan
from cluster.run.observation import AlarmActions, PoolObservation, ProbeObservation, ScoreAudits, StepRecords
from cluster.run.pools import start_pipeline, start_student_rollouts, start_teacher_rollouts
from cluster.run.preflight import run_live_checks
from cluster.run.prompt_record import compare_prompts, read_record, write_record
from cluster.run.recording import Recording
from cluster.run.replay import live, without_idle_workers
from cluster.run.self_teachers import TeacherGates
from cluster.run.served_teachers import ServedTeachers
from cluster.run.start_record import record_start
from cluster.run.summary import RunResult, RunSummary, describe_evaluation
from cluster.run.supervisor import Supervisor
from teacher_workers.audit.runner import ScoreAudit
from teacher_workers.backends.base import find_backend


def start_training(config: Config) -> RunSummary:
    """Train from the beginning."""
    check_trackers(config)
    load_hooks(config)  # one that cannot be imported ends the command before anything starts
    RunDirectory.refuse_taken(config)
    config, inputs = _prepare(config, _recorded_time(config))
    config = without_idle_workers(config, bool(inputs.held_out_ids))
    with _view(config) as view, ray_session(config) as session:
        written, config = config, with_memory_plan(config, inputs, cluster_gpu(), view.say)
        placement = await_placement(config, view.say)
        directory = RunDirectory.create(written)  # a resumed run may have other GPUs
        with run_lock(directory):
            write_record(directory, inputs)
            _announce(view, session, config, placement, inputs, directory)
            return _train(config, inputs, placement, view, directory)


def resume_training(directory: RunDirectory, config: Config) -> RunSummary:
    """Continue a run from its last intact checkpoint; from its beginning when none was written."""
    check_trackers(config)
    load_hooks(config)
    with run_lock(directory):
        return _resume(directory, config)


def _resume(directory: RunDirectory, config: Config) -> RunSummary:
    config = in_force(directory.teachers, directory.read_config(), config)
    warnings: list[str] = []
    state = find_resume_point(directory, config, warnings.append)
    if state is not None and state.step >= config.run.steps:
        raise CheckpointError(
            f"{directory.path}: step {state.step} of {config.run.steps} is done; "
            f"to go on, resume with run.steps above {state.step}; preceptor export {directory.path} writes the student"
        )
    began_with = read_record(directory)
    config, inputs = _prepare(config, now=None if began_with is None else began_with.began_at)
    config = without_idle_workers(config, bool(inputs.held_out_ids))
    if began_with is None:
        write_record(directory, inputs)
    else:
        warnings += compare_prompts(directory, began_with, inputs)
    with _view(config) as view, ray_session(config) as session:
        config = with_memory_plan(config, inputs, cluster_gpu(), view.say)
        placement = await_placement(config, view.say)
        _announce(view, session, config, placement, inputs, directory)
        for warning in warnings:
            view.say(warning)
        if state is not None:
            view.say(f"resuming after step {state.step}")
        else:
            view.say("resuming from the beginning: the run wrote no checkpoint")
            directory.samples.unlink(missing_ok=True)
        return _train(config, inputs, placement, view, directory, state)


def evaluate_models(config: Config) -> None:
    """Sample and verify the held-out prompts with the student as its files are, and with the teachers."""
    config, inputs = _prepare(config)
    if not inputs.held_out_ids:
        raise CheckpointError("prompts.held_out: the run file names no held-out prompts to evaluate on")
    with _view(config) as view, ray_session(config) as session:
        config = with_memory_plan(config, inputs, cluster_gpu(), view.say)
        placement = await_placement(config, view.say)
        _announce(view, session, config, placement, inputs)
        with start_student_rollouts(config, inputs, placement) as pool:
            tokenizer = load_tokenizer(config.student.model, config.student.trust_remote_code)
            _say(view, "student", Evaluator(config, inputs, tokenizer).evaluate_pool(pool))
        _measure_teachers(config, inputs, placement, view, None)


def check_run(config: Config) -> bool:
    """Print the placement, run every self-check and return whether all passed; of a replay, those of a live run."""
    config, inputs = _prepare(config, _recorded_time(config))
    config = live(config)
    with _view(config) as view, ray_session(config) as session:
        plan = memory_plan(config, inputs, cluster_gpu())
        for line in (*plan.choices, *plan.lines()):
            view.say(line)
        plan.refuse()
        config = plan.config
        placement = await_placement(config, view.say)
        _announce(view, session, config, placement, inputs)
        others = [name for name, teacher in config.teachers.items() if teacher.is_aligned]
        read = f"{', '.join(others)} by their bytes, all other" if others else "teachers"
        view.say(f"  ok    tokenizers: {read} read the student's token ids as the same tokens")
        view.say(f"  ok    context: every engine has room for {inputs.max_model_len} tokens")
        results = run_live_checks(config, inputs, placement)
        for result in results:
            view.say(f"  {result.describe()}")
        return all(result.passed is not False for result in results)


def _train(
    config: Config,
    inputs: Inputs,
    placement: Placement,
    view: TerminalView,
    directory: RunDirectory,
    state: RunState | None = None,
) -> RunSummary:
    beginning = state or RunSummary()
    record_start(directory, 0 if state is None else state.step, placement)

    def measure_teachers() -> None:
        if isinstance(beginning, RunSummary):  # a resumed run knows
            beginning.teacher_accuracy |= _measure_teachers(config, inputs, placement, view, directory)

    with (
        KeptStatus(directory.status, config.run.steps),
        start_pipeline(config, inputs, placement, before_teachers=measure_teachers) as pipeline,
        stop_on_signals(view.say) as stop,
    ):
        return Supervisor(config, inputs, pipeline, directory, view, stop, step_hooks).train(beginning)


def step_hooks(run: RunContext) -> list[StepHook]:
    """Return everything that happens around a step, in order.

    A hook's metrics reach the hooks below it: what stands above `StepRecords` is recorded and may raise an alarm. The
    evaluation of a step is not among the calls that `PoolObservation` counts for it. Alarms come before `StepEnd`,
    which writes the checkpoint and then stops the run. All end in the opposite order.
    """
    audit = ScoreAudit(current_config(run.config, run.pipeline), run.pipeline.teachers.pools, run.directory.score_audit)
    observation, checkpoints, balancer = PoolObservation(run), Checkpoints(run), make_balancer(run)
    evaluations = Evaluations(run)
    return [
        run.ledger,
        make_scaling(run),
        TeacherChanges(run, audit),
        ServedTeachers(run),
        observation,
        checkpoints,
        *([] if balancer is None else [balancer]),
        evaluations,
        TeacherGates(run, evaluations),
        KeptRows(run),
        ProbeObservation(run),
        Recording(run),
        *(hook(run) for hook in load_hooks(run.config)),
        StepRecords(run, observation),
        ScoreAudits(run, audit),
        AlarmActions(run),
        StepEnd(run, checkpoints),
        RunResult(run),
    ]


def _measure_teachers(
    config: Config, inputs: Inputs, placement: Placement, view: TerminalView, directory: RunDirectory | None
) -> dict[str, float | None]:
    """Let every teacher answer the held-out prompts by itself, one after the other, before it begins to score."""
    accuracies: dict[str, float | None] = {}
    if not (config.evaluation.teacher_too and inputs.held_out_ids):
        return accuracies
    for name in config.routes:
        teacher = config.teachers[name]
        if not teacher.num_workers or not find_backend(teacher).can_generate:
            continue
        if teacher.source is not None and not inputs.has_own_prompts(name):
            continue  # a teacher that is the student answers as the student does
        tokenizer = load_tokenizer(teacher.model, teacher.trust_remote_code)
        with start_teacher_rollouts(config, inputs, placement, name) as pool:
            evaluation = Evaluator(config, inputs, tokenizer).evaluate_pool(pool)
        accuracies[name] = evaluation.accuracy
        _say(view, f"teacher {name}{', with its context' if inputs.has_own_prompts(name) else ''}", evaluation)
        if directory is not None:
            write_samples(directory.samples, 0, f"teacher {name}", evaluation.samples)
    return accuracies


def _prepare(config: Config, now: datetime | None = None) -> tuple[Config, Inputs]:
    """Read models and prompts; return the run with what follows from its models, and its inputs."""
    inputs = load_inputs(config, now)
    return inputs.pairs.apply(config), inputs


def _recorded_time(config: Config) -> datetime | None:
    """Return what chat templates took for the time in the run that is replayed; None: nothing is, or it did not say."""
    if config.rollout.replay is None:
        return None
    record = read_record(RunDirectory.open(Path(config.rollout.replay.run)))
    return None if record is None else record.began_at


def _announce(
    view: TerminalView,
    session: RaySession,
    config: Config,
    placement: Placement,
    inputs: Inputs,
    directory: RunDirectory | None = None,
) -> None:
    if session.dashboard_address is not None:
        token = "" if session.token_file is None else f" (it asks for the token in {session.token_file})"
        view.say(f"Ray dashboard: http://{session.dashboard_address}{token}")
    for name, share in describe(placement):
        view.say(f"  {name}: {share}")
    for line in (*inputs.pairs.lines, *inputs.notes):
        view.say(line)
    if (warning := warning_of_dtype(config, placement.on_gpu)) is not None:
        view.say(warning)
    if directory is not None:
        view.say(f"run: {directory.path}")


def _view(config: Config) -> AbstractContextManager[TerminalView]:
    return terminal_view(config.run.name, config.run.steps, config.environment.reward_name)


def _say(view: TerminalView, model: str, evaluation: Evaluation) -> None:
    view.say(f"held-out, {model}: {describe_evaluation(evaluation)}")
