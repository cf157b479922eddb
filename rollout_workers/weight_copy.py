"""What the receiving end of a weight sync keeps between updates, so that the next one may send changes alone."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.models.weight_delta import BITS, apply, part_bytes

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class TensorPart:
    """One parameter in a bucket."""

    name: str
    dtype: str
    size: int  # values
    encoding: str
    num_values: int  # that stand in the bucket
    place: slice  # of its bytes in the bucket


@dataclass
class WeightCopy:
    """Whole parameters in host memory, as of one policy version; empty where only whole parameters come."""

    version: int | None = None  # None: no changes can be applied
    parameters: dict[str, Bytes] = field(default_factory=dict)

    def take(self, part: TensorPart, memory: Bytes) -> Bytes:
        """Bring a parameter up to date in place, and return it whole."""
        bits = BITS[part.dtype]
        if part.encoding == "whole" and part.name not in self.parameters:
            self.parameters[part.name] = np.empty(part.size * np.dtype(bits).itemsize, np.uint8)
        kept = self.parameters[part.name]
        apply(kept.view(bits), part.encoding, part.num_values, memory[part.place])
        return kept

    def forget(self) -> None:
        """Free the parameters."""
        self.version = None
        self.parameters.clear()


def parts(bucket: Any) -> Iterator[TensorPart]:
    """Yield the bucket's parameters: without encodings they stand whole, one after the other without gaps."""
    start = 0
    for position, (name, dtype, shape) in enumerate(zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True)):
        size, itemsize = prod(shape), np.dtype(BITS[dtype]).itemsize
        encoding, num_values, length = "whole", size, size * itemsize
        if bucket.encodings:
            encoding, num_values = bucket.encodings[position], bucket.num_values[position]
            length = part_bytes(encoding, num_values, size, itemsize)
        yield TensorPart(name, dtype, size, encoding, num_values, slice(start, start + length))
        start += length
