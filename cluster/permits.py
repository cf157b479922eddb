"""How far generation may run ahead of learning; pure arithmetic, tested exhaustively."""

from dataclasses import dataclass, field


@dataclass
class Permits:
    """Admits each step's requests once, at most `max_staleness` steps before the step is learned from.

    A step's completions begin under the weights of the step that was being learned from when it was admitted, so they
    are at most `max_staleness` updates old when their own turn comes. Nothing is dropped and nothing waits for a later
    step, so no setting can deadlock.

    Example:
        >>> permits = Permits(first_step=0, num_steps=4, max_staleness=1)
        >>> [list(permits.admit(step)) for step in range(4)]
        [[0, 1], [2], [3], []]
    """

    first_step: int
    num_steps: int
    max_staleness: int
    _next: int = field(init=False)

    def __post_init__(self) -> None:
        """Begin with the first step."""
        self._next = self.first_step

    def admit(self, step: int) -> range:
        """Return the steps to ask for now that `step` is about to be learned from."""
        admitted = range(self._next, min(step + self.max_staleness + 1, self.num_steps))
        self._next = max(self._next, admitted.stop)
        return admitted
