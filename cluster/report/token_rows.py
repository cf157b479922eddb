"""Makes of a run's kept rows what the report shows: some of them token by token, and distributions of all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.config.run_directory import RunDirectory
from cluster.contracts.columns import ragged
from cluster.contracts.kept_rows import KeptRowFiles
from cluster.contracts.trajectory import Floats

MOST_ROWS = 120  # of a run, shown token by token
MOST_TOKENS = 1_000  # of each; the rest is counted
MOST_CELLS = 250_000  # numbers of a run's rows together
WORST_PROMPTS = 10
BINS = 40
NOT_SHOWN = ("token_ids", "loss_mask", "version_changes", "token_texts", "vocabulary")


@dataclass
class Summary:
    """Holds what is read of every kept row: one entry per row, in order."""

    steps: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    log_ratios: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # completion tokens
    are_chosen: list[bool] = field(default_factory=list)
    token_ratios: list[Floats] = field(default_factory=list)  # per row: student - teacher log-probability of each token

    def add(self, step: int, rows: pa.Table) -> None:
        batch = rows.combine_chunks().to_batches()[0]
        self.steps += [step] * batch.num_rows
        self.ids += batch["trajectory_id"].to_pylist()
        self.prompt_ids += batch["prompt_id"].to_pylist()
        self.log_ratios += batch["log_ratio"].to_pylist()
        self.are_chosen += [reason == "chosen" for reason in batch["reason"].to_pylist()]
        student, teacher = ragged(batch, "student_logprobs"), ragged(batch, "teacher_logprobs")
        self.lengths += student.lengths.tolist()
        self.token_ratios += [student[row] - teacher[row] for row in range(len(student))]


def summarise(directory: RunDirectory) -> Summary:
    """Read all kept rows of a run."""
    summary = Summary()
    for step, rows in KeptRowFiles(directory.kept_rows).read():
        if rows.num_rows:
            summary.add(step, rows)
    return summary


def worst_rows(summary: Summary) -> list[int]:
    """Return, of the prompts with the largest log-ratios per token, the row that has each, the largest first."""
    best: dict[int, int] = {}
    for row in sorted(range(len(summary.steps)), key=lambda row: -summary.log_ratios[row]):
        best.setdefault(summary.prompt_ids[row], row)
    return list(best.values())[:WORST_PROMPTS]


def distributions(summary: Summary) -> list[dict[str, Any]]:
    """Return histograms of rows that were chosen at random: of the first and the last third of the steps kept."""
    rows = [row for row, chosen in enumerate(summary.are_chosen) if chosen]
    steps = sorted({summary.steps[row] for row in rows})
    if not steps:
        return []
    first, last = steps[(len(steps) - 1) // 3], steps[-(-2 * (len(steps) - 1) // 3)]
    parts = {f"steps {steps[0]} to {first}": [row for row in rows if summary.steps[row] <= first]}
    if last > first:
        parts[f"steps {last} to {steps[-1]}"] = [row for row in rows if summary.steps[row] >= last]

    def of_tokens(chosen: Sequence[int]) -> NDArray[Any]:
        return np.concatenate([np.empty(0), *(summary.token_ratios[row] for row in chosen)])

    lengths, ratios = np.array(summary.lengths), np.array(summary.log_ratios)
    return [
        _histogram("Completion length", "tokens", {name: lengths[part] for name, part in parts.items()}),
        _histogram("KL of a completion per token", "nats", {name: ratios[part] for name, part in parts.items()}),
        _histogram(
            "Log-ratio student / teacher of a token", "nats", {name: of_tokens(part) for name, part in parts.items()}
        ),
    ]


def _histogram(title: str, unit: str, parts: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Return shares of each part's values in common bins; what is beyond the thousandths counts in the last ones."""
    low, high = (float(edge) for edge in np.quantile(np.concatenate(list(parts.values())), [0.001, 0.999]))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    shares = {
        name: (np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / max(1, len(values))).round(5).tolist()
        for name, values in parts.items()
    }
    return {"title": title, "unit": unit, "edges": [float(f"{edge:.5g}") for edge in edges], "shares": shares}


def choose_rows(summary: Summary, most_rows: int = MOST_ROWS) -> list[int]:
    """Return which rows are shown token by token: those of the worst prompts, and others evenly over the run."""
    shown = worst_rows(summary)
    others = [row for row in range(len(summary.steps)) if row not in set(shown)]
    count = max(0, min(most_rows - len(shown), len(others)))
    shown += [others[int(place)] for place in np.linspace(0, len(others) - 1, count)] if count else []
    return sorted(shown[:most_rows])


def token_rows(directory: RunDirectory, summary: Summary, chosen: Sequence[int]) -> dict[str, Any]:
    """Return the chosen rows for the report's script, with the texts of all candidates; cut to what fits."""
    wanted = {(summary.steps[row], summary.ids[row]) for row in chosen}
    cells, rows = MOST_CELLS, []
    vocabulary: dict[int, str] = {}
    for step, table in KeptRowFiles(directory.kept_rows).read({step for step, _ in wanted}):
        for place, trajectory_id in enumerate(table["trajectory_id"].to_pylist()):
            if (step, trajectory_id) not in wanted or cells <= 0:
                continue
            row = _token_row(table.slice(place, 1).combine_chunks().to_batches()[0], MOST_TOKENS)
            cells -= row.pop("cells")
            vocabulary |= dict(table["vocabulary"][place].as_py())
            rows.append(row)
    return {"rows": rows, "vocabulary": vocabulary}


def _token_row(batch: pa.RecordBatch, most_tokens: int) -> dict[str, Any]:
    """Return one row: its single values, its tokens with their kinds, its columns per completion token, its lists."""
    mask = ragged(batch, "loss_mask")[0]
    length = min(most_tokens, len(mask))
    completion = int(mask[:length].sum())
    first = int(np.argmax(mask)) if mask.any() else len(mask)
    kinds = "".join("p" if place < first else "c" if mask[place] else "o" for place in range(length))
    row: dict[str, Any] = {
        "facts": {}, "columns": {}, "lists": {}, "contexts": {}, "kinds": kinds, "left_out": len(mask) - length,
        "texts": batch["token_texts"][0].as_py()[:length], "ids": ragged(batch, "token_ids")[0][:length].tolist(),
    }  # fmt: skip
    cells = 2 * length
    for name in batch.schema.names:
        kind = batch[name].type
        if name in NOT_SHOWN:
            continue
        if not pa.types.is_list(kind):
            row["facts"][name] = _plain(batch[name][0].as_py())
        elif pa.types.is_string(kind.value_type):
            row["contexts"][name.removesuffix("_texts")] = batch[name][0].as_py()[:most_tokens]
        elif pa.types.is_list(kind.value_type):
            row["lists"][name] = [[_plain(one) for one in of_token] for of_token in batch[name][0].as_py()[:completion]]
            cells += sum(map(len, row["lists"][name]))
        elif len(values := ragged(batch, name)[0]) == mask.sum():
            row["columns"][name] = _short(values[:completion])
            cells += completion
    row["columns"] |= _derived(batch, row["columns"], completion)
    return row | {"cells": cells}


def _derived(batch: pa.RecordBatch, columns: Mapping[str, Any], completion: int) -> dict[str, Any]:
    """Return columns that follow from others: the log-ratio, and which policy version wrote each token."""
    derived: dict[str, Any] = {}
    if "student_logprobs" in columns and "teacher_logprobs" in columns:
        student, teacher = (ragged(batch, f"{model}_logprobs")[0][:completion] for model in ("student", "teacher"))
        derived["log_ratio"] = _short(student - teacher)
    changes = ragged(batch, "version_changes")[0]
    versions = batch["min_policy_version"][0].as_py() + np.searchsorted(changes, np.arange(completion), side="right")
    return derived | {"policy_version": versions.tolist()}


def _short(values: NDArray[Any]) -> list[Any]:
    return [_plain(value) for value in values.tolist()]


def _plain(value: Any) -> Any:
    """Shorten a number to what its display can tell; what is not finite is None."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if np.isfinite(value) else None
