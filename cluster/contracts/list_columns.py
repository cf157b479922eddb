"""Views an Arrow list column as numpy arrays, without copying its values."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ragged:
    """A list column as numpy views: row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: NDArray[Any]  # [total] or [total, k]
    offsets: NDArray[np.int64]  # [rows + 1], first is 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[Any]:
        """Return a view of one row's values."""
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of values per row."""
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
