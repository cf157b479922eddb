"""Defines the types of configuration fields, the base of every section, and weights that change with the steps."""

from typing import Annotated

from msgspec import Meta, Struct, field

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


SMALLEST_SHARE = 1e-9  # of a whole number, by which a schedule's sum may miss one


class WeightSchedule(Section, frozen=True):
    """Moves a weight linearly from one value to another over the first optimizer steps; then it stays.

    Example:
        >>> [WeightSchedule(start=1.0, to=0.0, over_steps=10).at(step) for step in (0, 4, 10, 99)]
        [1.0, 0.6, 0.0, 0.0]
    """

    to: Finite
    over_steps: Count  # the first step that has all of `to`; steps count from 0
    start: Finite = field(name="from")

    def at(self, step: int) -> float:
        """Return the weight of optimizer step `step`, from 0: it depends on nothing else."""
        share = min(1.0, step / self.over_steps)
        return (1 - share) * self.start + share * self.to

    @property
    def largest(self) -> float:
        """Return the end that is farther from 0."""
        return max(self.start, self.to, key=abs)
