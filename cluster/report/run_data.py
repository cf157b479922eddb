"""Reads a run's directory for the report: what was run, its steps as curves, and what happened in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from cluster.config.fields import WeightSchedule
from cluster.config.objective import ObjectiveConfig
from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.config.terms import DivergenceTerm, Term
from cluster.contracts.files import RecordsFile
from cluster.monitoring.status_file import Status, read_status

MOST_POINTS = 1_000  # of one curve; more steps are averaged
DIVERGENCES = {
    "reverse_kl": "KL(student || target)",
    "forward_kl": "KL(target || student)",
    "jsd": "Jensen-Shannon divergence of student and target",
    "skewed_forward_kl": "KL(target || mixture of target and student)",
    "skewed_reverse_kl": "KL(student || mixture of student and target)",
}
SUPPORTS = {
    "sampled": "the sampled token",
    "samples": "{size} independent draws of the student",
    "topk": "the teacher's {size} most likely tokens",
    "student_topk": "the student's {size} most likely tokens",
    "intersection": "those of the teacher's {size} most likely tokens that are among the student's too",
    "full": "the whole vocabulary",
}
SAID_OTHERWISE = ("target", "when", "weight", "over", "divergence", "truncation", "residual")  # of a term's settings
TRUNCATIONS = {
    "tail": ", the rest as one",
    "renormalized": ", renormalised",
    "generalized": ", not normalised (generalised divergence)",
}


@dataclass(frozen=True)
class Event:
    """Marks a step at which something happened."""

    step: int
    kind: str  # start, alarm, restart, move, teacher
    text: str


@dataclass(frozen=True)
class RunData:
    """Holds what a run's directory says; lists are empty where it says nothing."""

    name: str
    config: Config
    directory: RunDirectory
    status: Status | None
    records: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    events: list[Event]

    @property
    def state(self) -> str:
        return self.status.state if self.status else "unknown"

    @property
    def step(self) -> int:
        return int(self.records[-1]["step"]) if self.records else 0

    def metric(self, name: str) -> list[float]:
        return [record[name] for record in self.records if name in record]


def read_run(path: Path) -> RunData:
    """Read a run that goes on or is over; raise CheckpointError where there is none, or a file is damaged."""
    directory = RunDirectory.open(path)
    config, records = directory.read_config(), RecordsFile(directory.metrics).read()
    starts = RecordsFile(directory.starts).read()
    return RunData(
        name=config.run.name,
        config=config,
        directory=directory,
        status=read_status(directory.status),
        records=records,
        starts=starts,
        samples=RecordsFile(directory.samples).read(),
        events=sorted(_events(directory, starts, records), key=lambda event: event.step),
    )


def curves(run: RunData) -> dict[str, list[list[float]]]:
    """Return the run's metrics as [steps, hours of steps until then, values]; long ones averaged."""
    hours, total = [], 0.0
    for record in run.records:
        total += record.get("step/seconds", 0.0) / 3600
        hours.append(total)
    by_name = {}
    for name in sorted({name for record in run.records for name in record} - {"step"}):
        points = [
            (record["step"], at, record[name]) for record, at in zip(run.records, hours, strict=True) if name in record
        ]
        size = -(-len(points) // MOST_POINTS)
        groups = [points[first : first + size] for first in range(0, len(points), size)]
        by_name[name] = [
            [group[-1][0] for group in groups],
            [round(group[-1][1], 6) for group in groups],
            [float(f"{fmean(value for *_, value in group):.6g}") for group in groups],
        ]
    return by_name


def facts(run: RunData) -> list[tuple[str, str]]:
    """Say what was run, as labels and texts."""
    config = run.config
    prompts, rollout, learner = config.prompts, config.rollout, config.learner
    lines = [
        ("state", _state(run)),
        (
            "student",
            f"{shown_name(config.student.model)}, learns in {learner.dtype}, samples in {rollout.engine.dtype}",
        ),
        *(
            (f"teacher {name}", f"{shown_name(teacher.model)} ({teacher.backend})")
            for name, teacher in config.teachers.items()
        ),
        ("objective", "; ".join(objective_in_words(config.objective))),
        (
            "data",
            f"{shown_name(prompts.train)}"
            + (f"; held out: {shown_name(prompts.held_out)}" if prompts.held_out else "; no held-out prompts"),
        ),
        (
            "each step",
            f"{prompts.prompts_per_step} prompts x {rollout.samples_per_prompt}, up to {rollout.max_completion_tokens} "
            f"tokens, temperature {rollout.temperature:g}, staleness up to {rollout.max_staleness}",
        ),
        (
            "learner",
            f"{learner.num_workers} x ZeRO {learner.zero_stage}, learning rate {learner.learning_rate:g} "
            f"({learner.lr_schedule})",
        ),
        ("seed", str(config.run.seed)),
    ]
    for start in run.starts[-1:]:
        placed = ", ".join(f"{name} {share}" for name, share in start.get("placement", {}).items())
        versions = ", ".join(f"{name} {version}" for name, version in start.get("packages", {}).items())
        lines += [("hardware", str(start.get("hardware", ""))), ("workers", placed), ("packages", versions)]
    return [(label, text) for label, text in lines if text]


def objective_in_words(objective: ObjectiveConfig) -> list[str]:
    """Describe an objective's terms, each in one sentence.

    Example:
        >>> objective_in_words(ObjectiveConfig())
        ["KL(student || target) over the teacher's 16 most likely tokens, the rest as one, corrected by sampled tokens"]
    """
    support = SUPPORTS[objective.support].format(size=objective.support_size)
    words = [_term_in_words(name, term, support, objective) for name, term in objective.terms.items()]
    return ([f"preset {objective.preset}"] if objective.preset else []) + words


def _term_in_words(name: str, term: Term, support: str, objective: ObjectiveConfig) -> str:
    loss = str(term.__struct_config__.tag).replace("_", " ")
    if isinstance(term, DivergenceTerm):
        loss = f"{DIVERGENCES.get(term.divergence, term.divergence)} over {support}"
        if objective.support not in ("full", "sampled"):
            loss += TRUNCATIONS[term.truncation]
        if term.has_residual and objective.support != "full":
            loss += ", corrected by sampled tokens"
    elif hasattr(term, "over"):
        loss += f" over {support if term.over == 'support' else SUPPORTS['sampled']}"
    loss += "".join(f", {name.replace('_', ' ')} {value}" for name, value in _changed(term).items())
    target = getattr(term, "target", {"teacher": 1.0})
    if target != {"teacher": 1.0}:
        loss += ", target " + " + ".join(f"{share:g} log {model}" for model, share in target.items())
    if term.when != "always":
        loss += f", where {term.when.replace('_', ' ')}"
    if isinstance(term.weight, WeightSchedule):
        return f"{term.weight.start:g} to {term.weight.to:g}, over {term.weight.over_steps} steps, x {loss}"
    return loss if term.weight == 1 else f"{term.weight:g} x {loss}"


def _changed(term: Term) -> dict[str, Any]:
    """Return the settings of a term that are not the default ones and not said otherwise; of a section, its kind."""
    default = type(term)()
    values = {name: getattr(term, name) for name in term.__struct_fields__ if name not in SAID_OTHERWISE}
    changed = {name: value for name, value in values.items() if value != getattr(default, name)}
    return {name: getattr(value, "kind", value) for name, value in changed.items()}


def shown_name(source: str) -> str:
    """Return a hub id as it is, and of a path the last part alone: reports are passed on, homes are not."""
    return Path(source).name or source if Path(source).is_absolute() else source


def _state(run: RunData) -> str:
    text = f"{run.state} after step {run.step} of {run.config.run.steps}"
    if run.starts:
        text += f", started {_time(run.starts[0]['at'])}"
    if len(run.starts) > 1:
        text += f", resumed {len(run.starts) - 1} times, last {_time(run.starts[-1]['at'])}"
    if run.status and run.status.error:
        text += f": {run.status.error.replace(str(run.directory.path), run.name)}"
    return text


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")


def _events(
    directory: RunDirectory, starts: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]
) -> list[Event]:
    events = [Event(start["step"], "start", f"resumed at {_time(start['at'])}") for start in starts[1:]]
    for alarm in RecordsFile(directory.alarms).read():
        text = f"{alarm['alarm']}: {alarm.get('figure', '')} is {alarm.get('value', float('nan')):.4g}"
        events.append(
            Event(
                alarm["step"], "alarm", f"{text}, limit {alarm.get('limit', float('nan')):.4g} ({alarm.get('action')})"
            )
        )
    events += [Event(move["step"], "move", str(move["sentence"])) for move in RecordsFile(directory.moves).read()]
    for version in RecordsFile(directory.teachers).read():
        if version.get("by") == "replacement":
            text = f"teacher {version['teacher']} is {shown_name(str(version['model']))} from this step on"
            events.append(Event(version["step"], "teacher", text))
    before: dict[str, float] = {}
    for record in records:
        counts = {name: value for name, value in record.items() if name.endswith("/restarts")}
        for name, value in counts.items():
            if value > before.get(name, 0):
                pool = name.removeprefix("pool/").removesuffix("/restarts")
                events.append(Event(record["step"], "restart", f"{pool}: {value - before.get(name, 0):.0f} restarted"))
        before = counts
    return events
