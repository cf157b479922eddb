"""The digest that both ends of a weight sync compute over the same bytes."""

from collections.abc import Iterable
from typing import Any

import xxhash


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
