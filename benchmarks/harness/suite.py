"""The parts of `make bench`, and the one table that they fill, in one sitting or in several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness.report import Row

CHANGING = ("command", "load_average")  # of a machine's description; the rest tells one machine from another


@dataclass(frozen=True)
class Part:
    """One program that measures; it takes `--output`, a JSON file for its rows."""

    module: str
    arguments: tuple[str, ...] = ()
    pair: str = "embedded"  # whose models it reads


PARTS = {
    "wire": Part("wire"),
    "stages-embedded": Part("stages", ("--pair", "embedded")),
    "stages-smollm2": Part("stages", ("--pair", "smollm2"), "smollm2"),
    "streaming": Part("streaming", ("--workers", "2", "8", "64", "256")),
    "plan": Part("plan"),
    "teacher-scoring-embedded": Part("teacher_scoring", ("--models", "embedded")),
    "teacher-scoring-smollm2": Part("teacher_scoring", ("--models", "smollm2"), "smollm2"),
    "objective": Part("objective"),
    "weight-sync": Part("weight_sync"),
    "end-to-end-embedded": Part("end_to_end", ("--pair", "embedded", "--rounds", "2")),
    "end-to-end-embedded-demo": Part(
        "end_to_end", ("--pair", "embedded", "--rounds", "1", "rollout.max_completion_tokens=48")
    ),
    "end-to-end-smollm2": Part("end_to_end", ("--pair", "smollm2", "--rounds", "1", "--steps", "1"), "smollm2"),
}


def labelled(part: str, rows: Sequence[Row], date: str, load_average: float) -> list[Row]:
    """Return a part's rows with what a table of several sittings must say of each."""
    return [{**found, "part": part, "date": date, "load_average": round(load_average, 2)} for found in rows]


def merge_rows(kept: Sequence[Row], measured: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Return one table in the order of PARTS; a part that was measured now replaces all its earlier rows."""
    by_part: dict[str, Sequence[Row]] = {
        part: [found for found in kept if found["part"] == part] for part in PARTS
    } | dict(measured)
    return [found for rows in by_part.values() for found in rows]


def same_machine(one: Row, other: Row) -> bool:
    """Return whether two descriptions are of machines alike, with the same software.

    Example:
        >>> same_machine({"cpus": 2, "load_average": 0.1}, {"cpus": 2, "load_average": 3.0})
        True
    """
    return _lasting(one) == _lasting(other)


def _lasting(machine: Row) -> Row:
    return {name: value for name, value in machine.items() if name not in CHANGING}
