"""What the driver sees of the workers: when it asked and was answered, and how each pool stands."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Stage = Literal["generate", "score", "learn", "sync"]


@dataclass(frozen=True)
class Span:
    """One call to a worker, from being sent to being answered; times are on the driver's clock of `perf_counter`.

    Example:
        >>> Span("rollout", "rollout-0", "generate", began=1.0, ended=1.5).seconds
        0.5
    """

    pool: str
    worker: str
    stage: Stage
    began: float
    ended: float
    num_rows: int = 0  # of the batch that the answer is about
    num_tokens: int = 0
    rollout: int | None = None  # that a generate call was of; in training the step
    lengths: tuple[int, ...] = ()  # completion tokens of each row of a generate call

    @property
    def seconds(self) -> float:
        """Return how long the call took, waiting in the worker's queue included."""
        return self.ended - self.began


@dataclass(frozen=True)
class PoolState:
    """How one pool stands at the end of a step."""

    name: str  # rollout, teacher-NAME, learner
    serving: Sequence[str]  # names of the workers that take work
    num_wanted: int  # workers that serve when none is on its way
    num_restarts: int  # since the run started or was resumed
    num_owed: int = 0  # completions of a rollout pool, batches of a teacher's
    model: str = ""  # of a teacher
    checkpoint: str = ""  # fingerprint of its files
