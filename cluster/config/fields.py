"""Defines the types of configuration fields, and the base of every section."""

from typing import Annotated

from msgspec import Meta, Struct

LARGEST_INT = 2**63 - 1  # what Arrow, vLLM and torch can hold
LARGEST_FLOAT = 1e30  # keeps infinity out, and what would become infinite in float32

Text = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1, le=LARGEST_INT)]
CountOrZero = Annotated[int, Meta(ge=0, le=LARGEST_INT)]
Items = Annotated[int, Meta(ge=1, le=1_000_000)]  # of what is kept in a list: workers, prompts, rows
Finite = Annotated[float, Meta(ge=-LARGEST_FLOAT, le=LARGEST_FLOAT)]
Positive = Annotated[float, Meta(gt=0, le=LARGEST_FLOAT)]
NonNegative = Annotated[float, Meta(ge=0, le=LARGEST_FLOAT)]
Fraction = Annotated[float, Meta(ge=0, le=1)]


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """Makes a configuration section immutable and closed."""
