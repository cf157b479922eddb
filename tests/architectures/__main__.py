"""Runs `preceptor check` on a tiny random pair of every architecture: `python -m tests.architectures [NAME...]`.

Prints a table: the architecture, whether the check passed, and what it measured or why the pair was refused.
"""

import sys
import tempfile
from pathlib import Path

from tests.architectures.matrix import check_pair
from tests.architectures.models import ARCHITECTURES


def main() -> int:
    """Return 1 unless every pair passes, or is refused in a sentence before an engine starts."""
    unknown = [name for name in sys.argv[1:] if name not in ARCHITECTURES]
    if unknown:
        sys.exit(f"there is no architecture called {', '.join(unknown)}; there are {', '.join(ARCHITECTURES)}")
    outcomes = []
    for name in sys.argv[1:] or ARCHITECTURES:
        with tempfile.TemporaryDirectory(prefix="architecture-") as folder:
            outcome = check_pair(name, Path(folder))
        outcomes.append(outcome)
        print(f"| {name} | {outcome.verdict} | {outcome.detail} | {outcome.seconds:.0f} s |", flush=True)
    return 0 if all(outcome.is_fine for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
