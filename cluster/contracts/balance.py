"""When workers move between pools by themselves, and within which limits."""

from typing import Annotated, Literal

from msgspec import Meta

from cluster.contracts.section import Items, Section


class BalanceConfig(Section, frozen=True):
    """Whether workers move between the rollout pool and the teachers' pools while a run goes on.

    `balance = "auto"` is short for a table with this mode.
    """

    mode: Literal["off", "auto"] = "off"
    observe_steps: Items = 4  # steps behind every decision, in which all workers serve
    cooldown_steps: Items = 4  # least steps from one move to the next; doubled by every move that goes back
    min_gain: Annotated[float, Meta(gt=0, lt=1)] = 0.05  # share of a step's seconds that a move must promise


def check_limits(num_workers: int, min_workers: int, max_workers: int | None) -> None:
    """Check that a pool begins within its limits; raises ValueError, which the reader turns into a ConfigError."""
    if num_workers < min_workers:
        raise ValueError(f"num_workers = {num_workers} is less than min_workers = {min_workers}; raise or lower one")
    if max_workers is not None and num_workers > max_workers:
        raise ValueError(f"num_workers = {num_workers} is more than max_workers = {max_workers}; raise or lower one")
