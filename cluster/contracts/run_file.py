"""Reads a run's configuration: TOML or the run directory's JSON, presets filled in, dotted overrides applied.

Example:
    >>> student, teacher = 'student.model = "a"', 'teachers.t.model = "b"'
    >>> parse_run_config(student + chr(10) + teacher, ["prompts.train=p.jsonl"]).objective.support
    'topk'
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from cluster.contracts.alarms import with_default_alarms
from cluster.contracts.config import Config
from cluster.contracts.errors import ConfigError
from cluster.contracts.objective import INITIAL_STUDENT, ObjectiveConfig
from cluster.contracts.presets import expand_preset
from cluster.contracts.section import Section


class _ObjectiveOnly(Section, frozen=True):
    objective: ObjectiveConfig


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run file and apply `section.field=value` overrides, values being TOML (bare words are strings).

    Raises:
        ConfigError: the file is missing or not TOML, a field is unknown or out of range, or settings contradict.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the run file: {error.strerror}") from error
    return parse_run_config(text, overrides, source=str(path))


def parse_run_config(text: str, overrides: Sequence[str] = (), source: str = "run file") -> Config:
    """Build a Config from TOML text; `source` is the name that errors give it."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from error
    return _build(tree, overrides, source)


def dump_run_config(config: Config) -> str:
    """Return the resolved configuration as JSON, every default written out."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2).decode()


def config_from_json(text: str, overrides: Sequence[str] = (), source: str = "config.json") -> Config:
    """Read back what `dump_run_config` wrote, and apply overrides to it."""
    try:
        tree = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{source}: not valid JSON: {error}") from error
    return _build(tree, overrides, source)


def _build(tree: dict[str, Any], overrides: Sequence[str], source: str) -> Config:
    if isinstance(tree.get("objective"), str):
        tree["objective"] = {"preset": tree["objective"]}
    for override in overrides:
        _apply_override(tree, override)
    if "objective" in tree:
        tree["objective"] = expand_preset(tree["objective"])
    tree["alarms"] = with_default_alarms(tree.get("alarms", {}))
    try:
        return msgspec.convert(_with_initial_student(tree), Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_in_our_words(error)}") from error


def _with_initial_student(tree: dict[str, Any]) -> dict[str, Any]:
    """Add the teacher `initial_student` where a target names it and the file does not describe it."""
    student, teachers, rollout = (tree.get(section, {}) for section in ("student", "teachers", "rollout"))
    objective = msgspec.convert({"objective": tree.get("objective", {})}, _ObjectiveOnly).objective
    sections = (student, teachers, rollout)
    if INITIAL_STUDENT not in objective.models or not all(isinstance(section, dict) for section in sections):
        return tree
    implied = {**student, "engine": rollout.get("engine", {})}
    return {**tree, "teachers": {**teachers, INITIAL_STUDENT: teachers.get(INITIAL_STUDENT, implied)}}


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override '{override}': expected section.field=value, for example run.steps=20")
    node = tree
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override '{override}': '{key}' is a value, not a section")
    node[keys[-1]] = _toml_value(value)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _in_our_words(error: Exception) -> str:
    """Say msgspec's finding with the field's path first: `learner.zero_stage: ...`."""
    message, at, path = str(error).rpartition(" - at `$.")
    if not at:
        return str(error).removesuffix(" - at `$`")
    return f"{path.rstrip('`')}: {message}"
