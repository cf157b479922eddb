"""Collects the settings of a new run file, each with the reason for it, and writes them as TOML."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config.run_config import Config
from cluster.config.run_file import parse_run_config
from cluster.contracts.errors import in_one_line

TEACHER = "main"  # NAME of its [teachers.NAME]
SECTIONS = (
    *("", "run", "student", "prompts", "environment", "rollout", "rollout.engine"),
    *(f"teachers.{TEACHER}", f"teachers.{TEACHER}.engine", "objective", "learner", "evaluation", "checkpoint", "ray"),
)
DEFAULTS = {
    "learner.gradient_checkpointing": False,
    "learner.offload_optimizer": "none",
    f"teachers.{TEACHER}.engine.tensor_parallel": 1,
}


@dataclass(frozen=True)
class Choice:
    """Holds one line of the run file."""

    value: Any
    why: str


class Draft:
    """Collects the lines of a run file, by their dotted fields."""

    def __init__(self) -> None:
        self.choices: dict[str, Choice] = {}

    def set(self, field: str, value: Any, why: str = "") -> None:
        self.choices[field] = Choice(value, why)

    def value(self, field: str) -> Any:
        return self.choices[field].value

    def drop_defaults(self) -> None:
        """Leave out what was tried and is what a run has anyway."""
        for field, default in DEFAULTS.items():
            if field in self.choices and self.value(field) == default:
                del self.choices[field]

    def config(self) -> Config:
        return parse_run_config(self.render(), source="the new run file")

    def reasons(self) -> list[str]:
        return [
            f"{field} = {to_toml(choice.value)}: {choice.why}" for field, choice in self.choices.items() if choice.why
        ]

    def render(self, head: Sequence[str] = ()) -> str:
        """Return the file, its sections in the order of `SECTIONS`."""
        lines = [f"# {in_one_line(line)}" for line in head]
        for section in SECTIONS:
            fields = [field for field in self.choices if field.rpartition(".")[0] == section]
            lines += [""] if fields else []
            lines += [f"[{section}]"] if fields and section else []
            for field in fields:
                choice = self.choices[field]
                line = f"{field.rpartition('.')[2]} = {to_toml(choice.value)}"
                lines.append(f"{line}  # {in_one_line(choice.why)}" if choice.why else line)
        return "\n".join(lines).lstrip("\n") + "\n"


def to_toml(value: Any) -> str:
    """Return a value in TOML, whose texts, numbers and truth values are written as in JSON."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {to_toml(part)}" for name, part in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)
