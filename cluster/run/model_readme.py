"""Writes the `README.md` of an exported student, as the Hugging Face hub reads it.

It names models, data, objective, settings, metrics and versions. It has no absolute path, no address of a server,
no key and no row of the prompts; the licence is left to the user.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from cluster.config.data_source import parse_source
from cluster.config.draft import to_toml
from cluster.config.objective import ObjectiveConfig
from cluster.config.presets import expand_preset
from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.config.run_file import parse_run_config
from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import PreceptorError
from cluster.contracts.files import RecordsFile

README = "README.md"
MARK = "<!-- Written by Preceptor; a file without this line is never replaced. -->"
METRICS = (  # label, name of the metric
    ("KL to the teacher per token, step's own prompts", "train/kl"),
    ("KL to the teacher per token, held-out prompts", "held_out/kl"),
    ("accuracy, held-out prompts", "held_out/accuracy"),
    ("completion length in tokens, held-out prompts", "held_out/completion_length"),
)
# Settings that say where a run ran and whom it told, not what it learned; and those that name keys.
LEFT_OUT = re.compile(r"ray\..*|logging\..*|run\.(name|directory)|checkpoint\..*|alarms\..*|.*\.api_key_env")
NEEDED = re.compile(r"student\.model|prompts\.train|objective\.preset|teachers\..*\.model")
TERM, KIND_OF_TERM = re.compile(r"objective\.terms\."), re.compile(r"objective\.terms\..*\.loss")
URL = re.compile(r"teachers\..*\.url")
ANY_SERVER = "http://host:8000/v1"  # in the place of one or several
MINIMAL_RUN = 'student.model = "s"\nteachers.t.model = "t"\nprompts.train = "p"'
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def add_readme(folder: Path, directory: RunDirectory, config: Config, step: int, say: Callable[[str], object]) -> None:
    """Write the file for the student after `step` into an export's folder, unless that has one that is not ours.

    One that cannot be written costs a line, for the model is there.
    """
    path = folder / README
    try:
        if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
            return
        records, starts = RecordsFile(directory.metrics).read(), RecordsFile(directory.starts).read()
        path.write_text(make_readme(config, records, step, starts[-1] if starts else {}), encoding="utf-8")
    except (OSError, PreceptorError) as error:
        say(f"{path}: it cannot be written: {error}")


def make_readme(config: Config, records: list[dict[str, Any]], step: int, start: Mapping[str, Any]) -> str:
    """Return the text; `records` are those of metrics.jsonl, `start` is the last of starts.jsonl, or empty."""
    from huggingface_hub import ModelCardData

    source = parse_source(config.prompts.train)
    data = ModelCardData(
        base_model=_hub_id(config.student.model),
        datasets=[source.place] if source.kind == "hub" else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["on-policy-distillation", "preceptor"],
    )
    parts = [f"---\n{data.to_yaml()}\n---\n{MARK}", f"# {config.run.name}", *_introduction(config, step)]
    if table := _metrics([record for record in records if record["step"] <= step]):
        parts += ["## Measured", table]
    parts += ["## Trained with", "```sh\npreceptor train run.toml\n```", f"```toml\n{settings(config)}```"]
    from cluster.run.start_record import packages

    versions: Mapping[str, str] = start.get("packages") or packages()
    parts.append(f"Packages: {', '.join(f'{name} {number}' for name, number in versions.items())}.")
    parts += ["## Licence", "Not set: add `license` above, as the base model, the teachers and the prompts allow."]
    return "\n\n".join(parts) + "\n"


def settings(config: Config) -> str:
    """Return the settings that are not a run's anyway, as lines of a run file.

    Example:
        >>> run = 'student.model="a/s"; teachers.t.model="/x/t"; prompts.train="/x/p.csv"'
        >>> print(settings(parse_run_config(run.replace("; ", chr(10)))))
        student.model = "a/s"
        prompts.train = "p.csv"
        teachers.t.model = "t"
        <BLANKLINE>
    """
    defaults, values = _defaults(config), dict(_flat(msgspec.to_builtins(config)))
    changed = {name for name, value in values.items() if value is not None and defaults.get(name) != value}
    if any(TERM.match(name) for name in changed):
        changed |= {name for name in values if KIND_OF_TERM.fullmatch(name)}
    lines = []
    for name, value in values.items():
        is_shown = name in changed or (NEEDED.fullmatch(name) and value is not None)
        if is_shown and not LEFT_OUT.fullmatch(name):
            shown = ANY_SERVER if URL.fullmatch(name) else public(value)
            lines.append(f"{name} = {to_toml(shown)}\n")
    return "".join(lines)


def _defaults(config: Config) -> dict[str, Any]:
    """Return what a run with this preset and these teachers would have otherwise."""
    preset = config.objective.preset
    objective = msgspec.convert(expand_preset({} if preset is None else {"preset": preset}), ObjectiveConfig)
    teacher = TeacherConfig(model="")
    trees = {
        **msgspec.to_builtins(parse_run_config(MINIMAL_RUN)),
        "objective": msgspec.to_builtins(objective),
        "teachers": {name: msgspec.to_builtins(teacher) for name in config.teachers},
    }
    return dict(_flat(trees))


def public(value: Any) -> Any:
    """Return a setting as others may read it: of a path that says where things lie on a machine, the last part.

    Example:
        >>> public("Qwen/Qwen3-8B"), public("/home/me/models/teacher"), public(["~/a.jsonl", 1])
        ('Qwen/Qwen3-8B', 'teacher', ['a.jsonl', 1])
    """
    if isinstance(value, list):
        return [public(part) for part in value]
    return Path(value).name if isinstance(value, str) and re.match(r"(file:)?[/~]", value) else value


def _hub_id(model: str) -> str | None:
    return model if HUB_ID.fullmatch(model) and not Path(model).exists() else None


def _introduction(config: Config, step: int) -> Iterator[str]:
    from cluster.report.run_data import objective_in_words

    student, prompts, rollout = public(config.student.model), config.prompts, config.rollout
    yield (
        f"`{student}` after {step} of {config.run.steps} steps of on-policy distillation: the student wrote, a teacher "
        "scored every token that it wrote, and the student learned from that."
    )
    held_out = "" if prompts.held_out is None else f", held out `{public(prompts.held_out)}`"
    completions = f"{rollout.samples_per_prompt} completions each, of up to {rollout.max_completion_tokens} tokens"
    rows = {
        "base model": f"`{student}`",
        "teachers": ", ".join(f"{name} (`{public(teacher.model)}`)" for name, teacher in config.teachers.items()),
        "prompts": f"`{public(prompts.train)}`{held_out}",
        "objective": "; ".join(objective_in_words(config.objective)),
        "each step": f"{prompts.prompts_per_step} prompts, {completions} at temperature {rollout.temperature:g}",
    }
    yield "| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(text)} |" for name, text in rows.items())


def _metrics(records: list[dict[str, Any]]) -> str:
    """Return the first and the last value of each metric as a table; "": no step says."""
    rows = []
    for label, name in METRICS:
        values = [(record["step"], record[name]) for record in records if name in record]
        if values:
            (first_step, first), (last_step, last) = values[0], values[-1]
            rows.append(f"| {label} | {first:.4g} (step {first_step}) | {last:.4g} (step {last_step}) |")
    return "\n".join(["| | first | last |", "|---|---|---|", *rows]) if rows else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting by its dotted name."""
    for key, value in tree.items():
        name = prefix + (key if BARE_KEY.fullmatch(key) else json.dumps(key))
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value
