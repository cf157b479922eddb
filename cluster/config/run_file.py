"""Reads a run's configuration: TOML or the run directory's JSON, presets filled in, dotted overrides applied.

Example:
    >>> student, teacher = 'student.model = "a"', 'teachers.t.model = "b"'
    >>> parse_run_config(student + chr(10) + teacher, ["prompts.train=p.jsonl"]).objective.support
    'topk'
"""

import logging
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cluster.config.advice import advice
from cluster.config.alarms import AlarmConfig, with_default_alarms
from cluster.config.fields import Section
from cluster.config.methods import expand_method
from cluster.config.objective import ObjectiveConfig
from cluster.config.presets import expand_preset
from cluster.config.run_config import Config
from cluster.config.stages import TeacherConfig
from cluster.config.terms import INITIAL_STUDENT, AnyTerm
from cluster.contracts.errors import ConfigError
from cluster.contracts.files import read_text

_log = logging.getLogger("preceptor")

MAX_RUN_FILE_BYTES = 1 << 20
# A text in place of the section is this field's.
_SHORT_FORMS = {"objective": "preset", "balance": "mode", "rollout.replay": "run"}
# Names that fields had in the last release, which still work in this one: their present names.
_RENAMED_FIELDS = {
    "weight_sync.mode": "weight_sync.payload",
    "weight_sync.backend": "weight_sync.transport",
    "evaluation.verifier": "environment.verifier",
}
# Fields that may hold a path, by section, besides those of teachers.
_PATHS = {
    "run": ("directory",),
    "student": ("model",),
    "prompts": ("train", "held_out"),
    "rollout.replay": ("run",),
}
MAX_DOTS = 4096  # tomllib takes the square of a dotted key's length
# Tables whose keys are the user's own names. They become names of actors, columns, figures and overrides.
_NAMED_TABLES: Mapping[str, Any] = {"teachers": TeacherConfig, "alarms": AlarmConfig, "objective.terms": AnyTerm}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


class _ObjectiveOnly(Section, frozen=True):
    objective: ObjectiveConfig


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run file and apply `section.field=value` overrides, values being TOML (bare words are strings)."""
    text = read_text(path, "run file", ConfigError, MAX_RUN_FILE_BYTES)
    return parse_run_config(text, overrides, source=str(path))


def parse_run_config(text: str, overrides: Sequence[str] = (), source: str = "run file") -> Config:
    """Build a Config from TOML text; `source` is the name that errors give it."""
    try:
        tree = _toml(text)
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
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected a JSON object, found {type(tree).__name__}")
    return _build(tree, overrides, source)


def _build(tree: dict[str, Any], overrides: Sequence[str], source: str) -> Config:
    _spell_out(tree, source)
    for override in overrides:
        _apply_override(tree, override)
        _spell_out(tree, f"override '{override}'")
    _check_texts(tree, source)
    _expand_home(tree)
    tree = expand_method(tree)
    if "objective" in tree:
        tree["objective"] = expand_preset(tree["objective"])
    tree["alarms"] = with_default_alarms(tree.get("alarms", {}))
    _check_names(tree, source)
    try:
        return msgspec.convert(_with_initial_student(_with_students_model(tree)), Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_in_our_words(error, tree)}") from error


def _spell_out(tree: dict[str, Any], source: str) -> None:
    """Make tables of short forms, so that overrides can name their fields, and rename fields of the last release."""
    for section, field in _SHORT_FORMS.items():
        table, _, name = section.rpartition(".")
        fields = _entries(tree, table) if table else tree
        if isinstance(fields.get(name), str):
            fields[name] = {field: fields[name]}
    for old, new in _RENAMED_FIELDS.items():
        (section, field), (new_section, new_field) = old.split("."), new.split(".")
        fields = _entries(tree, section)
        if field in fields and isinstance(tree.setdefault(new_section, {}), dict):
            _log.warning("%s: %s is now %s; rename it", source, old, new)
            tree[new_section][new_field] = fields.pop(field)


def _expand_home(tree: dict[str, Any]) -> None:
    """Write out the home folder in paths that begin with `~/`, as a shell does on the command line."""
    teachers = [f"teachers.{name}" for name in _entries(tree, "teachers")]
    for section in (*_PATHS, *teachers):
        entries = _entries(tree, section)
        for field in _PATHS.get(section, ("model", "tokenizer")):
            value = entries.get(field)
            if isinstance(value, str) and value.startswith("~/"):
                entries[field] = str(Path(value).expanduser())


def _with_students_model(tree: dict[str, Any]) -> dict[str, Any]:
    """Give teachers that are the student itself its model, and what they do not say of their engine from the rollouts'.

    Weights travel in the engine's dtype, and rollout engines alone sleep.
    """
    engine = {field: value for field, value in _entries(tree, "rollout.engine").items() if field != "sleep"}
    teachers = dict(_entries(tree, "teachers"))
    for name, teacher in teachers.items():
        if isinstance(teacher, dict) and teacher.get("from") == "student":
            of_teacher = {"engine": {**engine, **_entries(teacher, "engine")}}
            teachers[name] = {**_entries(tree, "student"), **teacher, **of_teacher}
    return {**tree, "teachers": teachers} if teachers else tree


def _with_initial_student(tree: dict[str, Any]) -> dict[str, Any]:
    """Add the teacher `initial_student` where a target names it and the file does not describe it."""
    student, teachers, rollout = (tree.get(section, {}) for section in ("student", "teachers", "rollout"))
    objective = msgspec.convert({"objective": tree.get("objective", {})}, _ObjectiveOnly).objective
    sections = (student, teachers, rollout)
    if INITIAL_STUDENT not in objective.needs.models or not all(isinstance(section, dict) for section in sections):
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
    if "\n" in text or "\r" in text:
        return text  # a second line would be a second field
    try:
        return _toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _toml(text: str) -> dict[str, Any]:
    """Parse TOML, refusing what takes tomllib for ever or out of the stack."""
    if any(part.count(".") > MAX_DOTS for line in text.splitlines() for part in line.split("=")):
        raise tomllib.TOMLDecodeError(f"a line has more than {MAX_DOTS} dots before the next '='")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise tomllib.TOMLDecodeError("values are nested too deeply") from error
    except ValueError as error:  # besides tomllib's own, that of an integer of thousands of digits
        raise tomllib.TOMLDecodeError(str(error)) from error


def _check_texts(tree: dict[str, Any], source: str) -> None:
    """Refuse characters that no file name, and no encoder, takes."""
    for field, text in _texts(tree):
        odd = next((character for character in text if character == "\0" or "\ud800" <= character <= "\udfff"), None)
        if odd is not None:
            raise ConfigError(f"{source}: {field!r} holds the character {odd!r}, which is no text; remove it")


def _texts(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every key and every text with the key that it stands under."""
    left: list[tuple[str, Any]] = [("", tree)]
    while left:
        field, value = left.pop()
        if isinstance(value, str):
            yield field, value
        elif isinstance(value, dict):
            left.extend(value.items())
            yield from ((key, key) for key in value)
        elif isinstance(value, list):
            left.extend((field, item) for item in value)


def _check_names(tree: dict[str, Any], source: str) -> None:
    for table in _NAMED_TABLES:
        for name in _entries(tree, table):
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"{source}: {table}: {name!r} cannot be a name; use up to 64 letters, digits, '.', '_' and '-'"
                )


def _entries(tree: Any, table: str) -> dict[str, Any]:
    for key in table.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def _in_our_words(error: Exception, tree: dict[str, Any]) -> str:
    """Say msgspec's finding with the field's path first: `learner.zero_stage: ...`."""
    message, at, path = str(error).rpartition(" - at `$.")
    if not at:
        message = str(error).removesuffix(" - at `$`")
        return message + advice(message, "", Config)
    path = path.rstrip("`")
    return f"{_with_name(path, tree)}: {message}{advice(message, path, Config)}"


def _with_name(path: str, tree: dict[str, Any]) -> str:
    """Put the name of the first entry that is wrong by itself in the place of msgspec's `[...]`."""
    table, _, rest = path.partition("[...]")
    for name, entry in _entries(tree, table).items() if table in _NAMED_TABLES else ():
        try:
            msgspec.convert(entry, _NAMED_TABLES[table])
        except msgspec.ValidationError:
            return f"{table}.{name}{rest}"
    return path
