"""Defines what both ends of a weight sync agree on: the manifest, the buckets, the checksum, the report."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def checksum(buffers: Iterable[Any]) -> str:
    """Return the XXH3 128-bit digest of the buffers' bytes in order; how they are split does not matter.

    Example:
        >>> checksum([b"ab", b"c"]) == checksum([b"abc"])
        True
    """
    digest = new_digest()
    for buffer in buffers:
        digest.update(buffer)
    return digest.hexdigest()


def new_digest() -> xxhash.xxh3_128:
    """Return the same digest for bytes that come one after the other: `update(buffer)`, then `hexdigest()`."""
    return xxhash.xxh3_128()


DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class TensorSpec:
    """Describes one tensor of the student's checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # a key of DTYPE_BYTES
    parameter: str | None = None  # of the learner, of which this and perhaps other tensors are made; None: the same

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


Manifest = Sequence[TensorSpec]  # all of the student, in the order in which it travels
Bucket = Sequence[TensorSpec]  # consecutive ones, which travel together


@dataclass(frozen=True)
class WeightSyncReport:
    """Says how one sync went."""

    policy_version: int
    checksum: str  # of all parameter bytes in manifest order; equal on the sender and on every receiver
    num_bytes: int  # put where the workers get them; how many get them does not count
    seconds: float
    paused_seconds: float | None = None  # from the first worker's pause to the last one's answer; None: not measured
    changed_fraction: float | None = None  # of the values, since the last sync; None: not compared


def total_bytes(tensors: Sequence[TensorSpec]) -> int:
    return sum(tensor.num_bytes for tensor in tensors)


def places(bucket: Bucket) -> Iterator[tuple[TensorSpec, slice]]:
    """Yield each tensor and where its bytes stand when all stand one after the other without gaps."""
    start = 0
    for tensor in bucket:
        yield tensor, slice(start, start + tensor.num_bytes)
        start += tensor.num_bytes


def plan_buckets(tensors: Manifest, bucket_bytes: int) -> Iterator[tuple[TensorSpec, ...]]:
    """Yield consecutive tensors in groups of at most `bucket_bytes`; a larger tensor travels alone.

    The tensors of one parameter stay together, so that it is gathered once.
    """
    bucket: list[TensorSpec] = []
    for _, group in groupby(tensors, key=lambda tensor: tensor.parameter or tensor.name):
        together = list(group)
        if bucket and total_bytes([*bucket, *together]) > bucket_bytes:
            yield tuple(bucket)
            bucket = []
        bucket += together
    if bucket:
        yield tuple(bucket)
