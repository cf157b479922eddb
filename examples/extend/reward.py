"""A reward of one's own: full marks for a short completion, less for a longer one.

    [environment.rewards]
    exact = 1.0
    "examples.extend.reward:brevity" = 0.2

docs/data.md says what rewards do.
"""

from typing import Any

ENOUGH_CHARACTERS = 40  # of a completion; a column `enough` of the prompt's row says otherwise


def brevity(prompt: str, completion: str, columns: dict[str, Any]) -> float:
    """Return 1 up to the length that is enough, and its share of the length beyond."""
    enough = columns.get("enough", ENOUGH_CHARACTERS)
    return min(1.0, enough / max(1, len(completion)))
