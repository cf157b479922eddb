"""Defines what the driver sees of the work: batches by reference, calls to workers, the state of each pool."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cluster.contracts.metrics import Metrics

Stage = Literal["generate", "score", "learn", "sync"]


@dataclass(frozen=True)
class Span:
    """Times one call to a worker, from being sent to being answered; times are on the driver's clock of `perf_counter`.

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
    """Describes one pool at the end of a step."""

    name: str  # rollout, teacher-NAME, learner
    serving: Sequence[str]  # names of the workers that take work
    num_wanted: int  # workers that serve when none is on its way
    num_restarts: int  # since the run started or was resumed
    num_owed: int = 0  # completions of a rollout pool, batches of a teacher's
    model: str = ""  # of a teacher
    checkpoint: str = ""  # fingerprint of its files


@dataclass(frozen=True)
class BatchHandle:
    """Describes a trajectory batch to the driver: where its bytes are, and counts that do not grow with its length."""

    reference: Any  # ray.ObjectRef to the batch's wire bytes (pa.Buffer)
    teacher: str
    trajectory_ids: tuple[int, ...]
    num_tokens: tuple[int, ...]  # prompt + completion, per row
    num_completion_tokens: tuple[int, ...]  # per row
    prompt_ids: tuple[int, ...] = ()  # per row
    rewards: tuple[float | None, ...] = ()  # per row
    min_policy_versions: tuple[int, ...] = ()  # per row
    max_policy_versions: tuple[int, ...] = ()  # per row
    num_loss_tokens: tuple[int, ...] = ()  # per row: completion tokens that are learned from; empty: all are
    episode_ids: tuple[int, ...] = ()  # per row, all rows of an episode in one batch; empty: the trajectories' own ids
    num_failed: int = 0  # episodes whose environment failed
    rollout: int = 0  # which request of the rollout pool it answers; in training the step
    is_last: bool = False  # whether the worker that wrote it has written everything of the rollout
    metrics: Metrics = field(default_factory=dict)
    spans: tuple[Span, ...] = ()  # of the calls that made it, in order; the pools fill them in
    scored_by: Mapping[str, str] = field(default_factory=dict)  # [teachers.NAME] -> fingerprint of its checkpoint
    scorer_version: int = 0  # of the weights of the model that scored last
    is_replayed: bool = False  # another run sampled it, and the policy versions are of that run
    teacher_versions: Mapping[str, int] = field(default_factory=dict)  # [teachers.NAME] -> version, of self-teachers

    @property
    def episodes(self) -> tuple[int, ...]:
        """Return the episode of each row."""
        return self.episode_ids or self.trajectory_ids

    @property
    def num_episodes(self) -> int:
        """Return how many requests the batch answers."""
        return len(set(self.episode_ids)) if self.episode_ids else len(self.trajectory_ids)


class BatchSource(Protocol):
    """The scored batches of one step, of which some may still be on their way."""

    @property
    def is_exhausted(self) -> bool:
        """Return whether every batch was given out."""

    @property
    def missing(self) -> int:
        """Return how many requests of the step are still generated or scored."""

    def take(self, wake_on: Sequence[Any] = ()) -> list[BatchHandle]:
        """Return the batches not given out yet, waiting for one; with none when a reference of `wake_on` is ready."""

    def move_on_until(self, references: Sequence[Any]) -> None:
        """Move batches of other steps on until a reference is ready; return at once where there are none."""


class ReadyBatches:
    """A BatchSource of batches that are all there."""

    def __init__(self, handles: Iterable[BatchHandle]) -> None:
        self._handles = list(handles)

    @property
    def is_exhausted(self) -> bool:
        return not self._handles

    @property
    def missing(self) -> int:
        return 0

    def take(self, wake_on: Sequence[Any] = ()) -> list[BatchHandle]:
        handles, self._handles = self._handles, []
        return handles

    def move_on_until(self, references: Sequence[Any]) -> None:
        """Do nothing: no other step is under way."""
