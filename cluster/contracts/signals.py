"""Lists, in one table, what a scoring model may say of each sampled token; every column of scores follows from it.

To add a signal, add a `Signal` to `SIGNALS`, or name one by import path in `teachers.NAME.signals` of the run file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.contracts.errors import ConfigError
from cluster.contracts.import_path import is_import_path, load_object

Width = Literal["one", "candidates", "model"]  # values per token: one, one per candidate, or as many as the model has
# What the signal of position t depends on: the tokens before t and t itself, or only the tokens before t.
Reads = Literal["token", "position"]

FLOOR = -87.0  # log-probability of ids that a model lacks or excludes; the smallest normal float32 is exp(-87.3)
_BFLOAT16_EXPONENT = np.uint16(0x7F80)  # all ones in NaN and infinities


@dataclass(frozen=True)
class Signal:
    """Describes one column that a scoring model adds: numpy [completion_tokens], or [completion_tokens, width].

    Example:
        >>> SIGNALS["entropy"].column("teacher")
        'teacher_entropy'
    """

    name: str
    dtypes: tuple[pa.DataType, ...] = (pa.float32(),)  # floats are finite; integers are ids or counts, from 0
    width: Width = "one"
    is_shared: bool = False  # all models of a batch have the column together, so no model is in its name
    is_rechecked: bool = True  # every receiver reads the values again; not those that are most of a batch's bytes
    audited: Reads | None = None  # how an audit compares the signal, in nats or as vectors; None: only checked

    def column(self, model: str) -> str:
        return self.name if self.is_shared else f"{model}_{self.name}"

    def arrow_types(self, num_candidates: int, width: int) -> list[pa.DataType]:
        """Return the Arrow types that the column may have; `width` is what a column of a model's own width has."""
        if self.width == "one":
            return [pa.list_(dtype) for dtype in self.dtypes]
        size = num_candidates if self.width == "candidates" else width
        return [pa.list_(pa.list_(dtype, size)) for dtype in self.dtypes] if size else []


SIGNALS: dict[str, Signal] = {
    signal.name: signal
    for signal in (
        Signal("logprobs", audited="token"),  # of the sampled tokens, at temperature 1, in nats; always there
        Signal("candidate_ids", (pa.int32(),), "candidates", is_shared=True),  # chosen by the model, most likely first
        Signal("candidate_logprobs", width="candidates", audited="position"),  # of the chosen or given candidates
        Signal("entropy", audited="position"),  # in nats
        # The last hidden states after the final norm; uint16 holds bfloat16's bits, which numpy cannot.
        Signal("hidden", (pa.float32(), pa.float16(), pa.uint16()), "model", is_rechecked=False, audited="position"),
        # Of a teacher with a tokenizer of its own: 1 where one token of either side covers the same bytes, and which
        # candidates are tokens of both. All else that it says counts there alone.
        Signal("aligned", (pa.uint8(),)),
        Signal("shared", (pa.uint8(),), "candidates"),
        # Hidden states of several layers, one after the other, or what a projection bank makes of them.
        Signal("layers", (pa.float32(), pa.float16(), pa.uint16()), "model", is_rechecked=False, audited="position"),
    )
}

Scores = Mapping[str, NDArray[Any]]  # name in SIGNALS, or a signal's import path -> values of a batch's sampled tokens


def find_signal(name: str) -> Signal:
    """Return the signal of a name in SIGNALS, or at an import path; raise ConfigError if there is none."""
    if not is_import_path(name):
        if name not in SIGNALS:
            raise ConfigError(f"there is no signal '{name}'; expected one of {sorted(SIGNALS)} or an import path")
        return SIGNALS[name]
    signal = load_object(name, "a signal")
    if not isinstance(signal, Signal) or signal.name in SIGNALS:
        raise ConfigError(f"'{name}' is {signal!r}; expected a Signal whose name is none of {sorted(SIGNALS)}")
    return signal


def find_signals(paths: Iterable[str]) -> list[Signal]:
    """Return all signals of the table, and those at import paths behind them."""
    return [*SIGNALS.values(), *(find_signal(path) for path in paths)]


def is_finite(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell which values of a column are finite; uint16 stands for bfloat16's bits.

    Example:
        >>> is_finite(np.array([0x3F80, 0x7F80], np.uint16)).tolist()  # 1 and infinity
        [True, False]
    """
    if values.dtype == np.uint16:
        return (values & _BFLOAT16_EXPONENT) != _BFLOAT16_EXPONENT
    return np.isfinite(values)
