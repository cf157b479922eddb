"""Views an Arrow list column as numpy arrays, without copying its values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.contracts.errors import TrajectoryError

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Bytes = NDArray[np.uint8]
FinishReason = Literal["stop", "length", "repetition", "abort", "environment_error"]


@dataclass(frozen=True)
class Ragged:
    """A list column as numpy views: row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: NDArray[Any]  # [total] or [total, k]
    offsets: NDArray[np.int64]  # [rows + 1], first is 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)


def ragged(batch: pa.RecordBatch, name: str) -> Ragged:
    """View a list column; candidates and hidden states come as [total, k]."""
    column = batch[name]
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.values.slice(offsets[0], offsets[-1] - offsets[0])
    if pa.types.is_fixed_size_list(values.type):
        flat = values.flatten().to_numpy().reshape(-1, values.type.list_size)
    else:
        flat = values.to_numpy()
    return Ragged(flat, offsets - offsets[0])


def check_rows(batch: pa.RecordBatch, per_completion_token: Mapping[str, bool], finish_reasons: Sequence[str]) -> None:
    """Check what holds between the columns of every row of a batch, generated or scored.

    `per_completion_token` names the columns with one entry per completion token, and says whether their values are
    read, or only their lengths.

    Raises:
        TrajectoryError: a column's length does not fit its row's tokens, an id or a count is negative, or a
            log-probability is not finite; names the first such row.
    """
    for name in ("trajectory_id", "prompt_id", "sample_index", "min_policy_version", "episode_id", "turn"):
        _require(batch, batch[name].to_numpy() >= 0, f"{name} is negative")
    known = pc.is_in(batch["finish_reason"], pa.array(list(finish_reasons))).to_numpy(zero_copy_only=False)
    _require(batch, known, f"finish_reason is none of {', '.join(finish_reasons)}")
    rewards = pc.is_finite(pc.fill_null(batch["reward"], 0.0)).to_numpy(zero_copy_only=False)
    _require(batch, rewards, "reward is NaN or infinity")
    completion_tokens = _check_tokens(batch)
    for name, reads_values in per_completion_token.items():
        _check_completion_column(batch, name, reads_values, completion_tokens)
    _check_versions(batch, completion_tokens)


def _require(batch: pa.RecordBatch, holds: NDArray[Any], fault: str, *counts: NDArray[np.int64]) -> None:
    """Raise for the first row that does not hold; `{}` in the fault stand for that row's values."""
    if not holds.all():
        row = int(np.argmin(holds))
        raise TrajectoryError(
            f"trajectory {batch['trajectory_id'][row]}: {fault.format(*(int(v[row]) for v in counts))}"
        )


def _require_of_values(batch: pa.RecordBatch, column: Ragged, holds: Any, fault: str) -> None:
    """Raise for the first row with a value for which `holds` is False; it has an entry for each value."""
    _require(batch, _sums(column, ~holds) == 0, fault)


def _sums(column: Ragged, values: NDArray[Any]) -> NDArray[np.int64]:
    """Add up the values of each row; `values` are as many as the column's."""
    sums = np.zeros(len(column), np.int64)
    is_empty = column.lengths == 0
    if not is_empty.all():
        sums[~is_empty] = np.add.reduceat(values, column.offsets[:-1][~is_empty], dtype=np.int64)
    return sums


def _has_negative(values: NDArray[Any]) -> bool:
    return bool(values.min(initial=0) < 0)


def _all_finite(values: NDArray[Any]) -> bool:
    """Return whether all values are finite; one pass over them, for no sum with NaN or infinity in it is finite."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(values.sum()) or np.isfinite(values).all())


def _check_tokens(batch: pa.RecordBatch) -> NDArray[np.int64]:
    """Check the columns of one value per token; return each row's number of completion tokens."""
    tokens, mask = ragged(batch, "token_ids"), ragged(batch, "loss_mask")
    fault = "loss_mask has {} values for {} tokens; every per-token column must have one value per token"
    _require(batch, mask.lengths == tokens.lengths, fault, mask.lengths, tokens.lengths)
    if _has_negative(tokens.values):
        _require_of_values(batch, tokens, tokens.values >= 0, "a token id is negative")
    if mask.values.max(initial=0) > 1:
        _require_of_values(batch, mask, mask.values <= 1, "loss_mask holds values other than 0 and 1")
    starts = mask.offsets[:-1][mask.lengths > 0]
    first = np.zeros(len(mask), bool)
    first[mask.lengths > 0] = mask.values[starts] > 0
    _require(batch, ~first, "the first token is marked as sampled, but nothing precedes it")
    return _sums(mask, mask.values)


def _check_completion_column(
    batch: pa.RecordBatch, name: str, reads_values: bool, completion_tokens: NDArray[np.int64]
) -> None:
    column = ragged(batch, name)
    fault = f"{name} has {{}} values for {{}} completion tokens"
    _require(batch, column.lengths == completion_tokens, fault, column.lengths, completion_tokens)
    if not reads_values or not column.values.size:
        return
    # A row is looked for only where a value is at fault: most batches have none, and each pass over them takes time.
    values = column.values.reshape(len(column.values), -1)
    if np.issubdtype(values.dtype, np.integer):
        if _has_negative(values):
            fault = "a candidate id is negative" if name == "candidate_ids" else f"{name} holds a negative number"
            _require_of_values(batch, column, (values >= 0).all(1), fault)
    elif not _all_finite(values):
        fault = f"{name} holds NaN or infinity; the model may have diverged"
        _require_of_values(batch, column, np.isfinite(values).all(1), fault)


def _check_versions(batch: pa.RecordBatch, completion_tokens: NDArray[np.int64]) -> None:
    """Check that the oldest version wrote the first token, and the newest the last."""
    changes = ragged(batch, "version_changes")
    oldest, newest = (batch[name].to_numpy() for name in ("min_policy_version", "max_policy_version"))
    fault = "version_changes has {} values for policy versions {} to {}"
    _require(batch, changes.lengths == newest - oldest, fault, changes.lengths, oldest, newest)
    for row in np.flatnonzero(changes.lengths):
        positions = changes[row]
        if not (positions[0] > 0 and positions[-1] < completion_tokens[row] and (np.diff(positions) >= 0).all()):
            raise TrajectoryError(
                f"trajectory {batch['trajectory_id'][row]}: version_changes is {positions.tolist()}; expected "
                f"positions that do not fall, from 1 to {completion_tokens[row] - 1}"
            )
