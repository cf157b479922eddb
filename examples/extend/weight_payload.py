"""Sends float32 weights as bfloat16, in half the bytes: the rollout workers run on the rounded weights.

[weight_sync]
payload = "examples.extend.weight_payload:HalvesPayload"
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cluster.weight_sync.manifest import Bucket, Bytes, places
from cluster.weight_sync.transports import Encoded

HALF_BITS = 16
QUIET_NAN = 0x7FC0


class HalvesPayload:
    """Sends the upper half of every float32 value, rounded to the nearest bfloat16; other dtypes travel as they are."""

    is_incremental = False

    def encode(self, bucket: Bucket, values: Bytes, has_base: bool) -> Encoded:
        """Round the values in place, for the checksum is of what arrives, and return the upper halves."""
        parts = []
        for tensor, place in places(bucket):
            part = values[place]
            if tensor.dtype == "float32":
                halves = to_bfloat16(part.view(np.float32))
                part.view(np.uint32)[:] = halves.astype(np.uint32) << HALF_BITS
                part = halves.view(np.uint8)
            parts.append(part)
        # Without fields a receiver would take the bytes for the values themselves.
        return Encoded(np.concatenate(parts), {"halved": [tensor.dtype == "float32" for tensor in bucket]})

    def decode(self, bucket: Bucket, encoded: Encoded) -> Iterator[Bytes]:
        """Put zeros in the place of the lower halves."""
        start = 0
        for tensor, is_halved in zip(bucket, encoded.fields["halved"], strict=True):
            end = start + (tensor.num_bytes // 2 if is_halved else tensor.num_bytes)
            part = encoded.memory[start:end]
            start = end
            if is_halved:
                # A copy first: behind a tensor of another dtype, a half may stand at an odd place.
                part = (np.frombuffer(part.tobytes(), np.uint16).astype(np.uint32) << HALF_BITS).view(np.uint8)
            yield part


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bits of the nearest bfloat16, ties to the even one.

    Example:
        >>> [hex(bits) for bits in to_bfloat16(np.array([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8], np.float32))]
        ['0x3f80', '0x3f80', '0x3f82']
    """
    bits = values.view(np.uint32)
    is_odd = bits >> HALF_BITS & 1
    rounded = (bits + 0x7FFF + is_odd >> HALF_BITS).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(QUIET_NAN), rounded)
