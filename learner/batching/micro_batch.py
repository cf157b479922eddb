"""Lays the trajectories of one micro-batch out in a grid of tokens, with flat completion columns beside it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.contracts.errors import TrajectoryError
from cluster.contracts.signals import find_signals
from cluster.contracts.trajectory import (
    STUDENT,
    Ragged,
    models_in,
    num_candidates_of,
    ragged,
    signal_paths,
    strict_tokens,
)
from learner.batching.plan import Grid
from learner.loss.tokens import CompletionTokens, map_tensors

if TYPE_CHECKING:
    from learner.kept_rows import Watch

PAD_TOKEN_ID = 0  # any id of the vocabulary: no completion token attends to it


@dataclass(frozen=True)
class RoutedTokens:
    """Holds some completion tokens of one teacher, and the signals of a width that depends on the model."""

    route: str  # the NAME of [teachers.NAME]
    places: Tensor  # [m] int64: which completion tokens of the micro-batch
    scores: Mapping[str, Mapping[str, Tensor]]  # model -> signal -> [m, width]

    @property
    def hidden(self) -> Mapping[str, Tensor]:
        """Return each model's hidden states, [m, width]; empty where none were requested."""
        return {model: signals["hidden"] for model, signals in self.scores.items() if "hidden" in signals}

    def split(self, max_tokens: int) -> Iterator["RoutedTokens"]:
        """Cut into as few parts of at most so many tokens as can be, all of about the same size."""
        num_parts = -(-len(self.places) // max_tokens)
        for index in range(num_parts):
            part = slice(len(self.places) * index // num_parts, len(self.places) * (index + 1) // num_parts)
            yield RoutedTokens(self.route, self.places[part], _pick(self.scores, part))


@dataclass(frozen=True)
class MicroBatch:
    """Holds the tokens of one forward and backward of one rank.

    `position_ids` restart at 0 with every trajectory and are 0 at padding, so every pad is a segment of its own:
    transformers builds the block-causal mask from the positions when it is given no attention mask. Completion tokens
    come in grid order.
    """

    input_ids: Tensor  # [rows, row_length] int64
    position_ids: Tensor  # [rows, row_length] int64
    predicting: Tensor  # [completion_tokens] int64: place in the flattened grid whose hidden state predicts the token
    places: Tensor  # [tokens] int64: places of the flattened grid that are no padding, ascending
    lengths: tuple[int, ...]  # tokens of each trajectory, in the order of `places`; of an empty grid, its one pad's
    tokens: CompletionTokens
    routes: tuple[RoutedTokens, ...]  # every completion token is in one of them
    watch: "Watch | None" = None  # reads what the forward says of rows that are kept

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the micro-batch there; from pinned memory without waiting for the copy."""
        return self.changed(lambda tensor: tensor.to(device, non_blocking=True))

    def changed(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """Return the micro-batch with every tensor replaced by what `change` makes of it."""
        own: dict[str, Any] = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        tokens = CompletionTokens(**map_tensors(vars(self.tokens), change))
        routes = [RoutedTokens(one.route, change(one.places), map_tensors(one.scores, change)) for one in self.routes]
        return replace(self, **own, tokens=tokens, routes=tuple(routes))


@dataclass(frozen=True)
class Trajectory:
    """Views the columns of one trajectory that the learner needs; models score it under their roles.

    Beside a teacher with its own tokenizer, completion tokens are those that it scored; no others are learned from.
    """

    trajectory_id: int
    route: str
    task_advantage: float
    token_ids: NDArray[Any]  # [tokens]
    loss_mask: NDArray[Any]  # [tokens] 1 where a completion token stands
    rollout_logprobs: NDArray[Any]  # [completion_tokens]
    candidate_ids: NDArray[Any]  # [completion_tokens, k]
    candidate_rollout_logprobs: NDArray[Any]  # [completion_tokens, k], or [completion_tokens, 0]
    scores: Mapping[str, Mapping[str, NDArray[Any]]]  # model -> signal -> [completion_tokens] or [completion_tokens, k]
    wide_scores: Mapping[str, Mapping[str, NDArray[Any]]]  # the same of signals that have the model's own width
    reward: float = math.nan  # NaN: none
    weight: float = 1.0  # in every term
    privileged: bool = False  # another sampler than the student wrote it
    strict: NDArray[np.bool_] | None = None  # [sampled tokens] which of them are completion tokens; None: all
    episode_id: int = 0
    turn: int = 0  # completions of the episode before this row's first

    @property
    def positions(self) -> NDArray[Any]:
        """Return the places of the completion tokens among all that the student sampled."""
        return np.arange(len(self.rollout_logprobs)) if self.strict is None else np.flatnonzero(self.strict)

    @property
    def turns(self) -> NDArray[np.int64]:
        """Return which turn of its episode each completion token is of: tokens between which none was read are one's.

        Beside a teacher with its own tokenizer, trajectories have one turn.
        """
        places = np.flatnonzero(self.loss_mask)
        if self.strict is not None:
            return np.full(len(places), self.turn)
        return self.turn + np.cumsum(np.diff(places, prepend=places[:1]) > 1)

    @property
    def num_sampled(self) -> int:
        return len(self.rollout_logprobs) if self.strict is None else len(self.strict)


def trajectories(
    batches: Sequence[pa.RecordBatch], task_advantages: Sequence[float] | None = None, weights: Sequence[float] = ()
) -> list[Trajectory]:
    """View all rows of batches, which must have the same columns, in order.

    Without advantages, these are 0, and without weights, these are 1.
    """
    kinds = {(num_candidates_of(batch), ", ".join(sorted(batch.schema.names))) for batch in batches}
    if len(kinds) > 1:
        described = "; ".join(f"{width} candidates, columns {names}" for width, names in sorted(kinds))
        raise TrajectoryError(f"learner: the batches of one step differ in what they carry: {described}")
    num_rows = sum(batch.num_rows for batch in batches)
    advantages = iter([0.0] * num_rows if task_advantages is None else task_advantages)
    weight = iter(weights or [1.0] * num_rows)
    return [row for batch in batches for row in _rows(batch, advantages, weight)]


def build_micro_batch(grid: Grid, rows: Sequence[Trajectory], seed: int) -> MicroBatch:
    """Lay the grid's trajectories out; an empty grid becomes one pad token and no completion tokens.

    What is random about a token depends on the run's seed and on the trajectory's id alone.
    """
    row_length = max([1, *(sum(len(rows[index].token_ids) for index in grid_row) for grid_row in grid)])
    shape = (max(1, len(grid)), row_length)
    input_ids = np.full(shape, PAD_TOKEN_ID, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    predicting, places = [], []
    for row, grid_row in enumerate(grid):
        start = 0
        for index in grid_row:
            length = len(rows[index].token_ids)
            input_ids[row, start : start + length] = rows[index].token_ids
            position_ids[row, start : start + length] = np.arange(length)
            # The hidden state one place to the left of a token predicts it.
            predicting.append(row * row_length + start + np.flatnonzero(rows[index].loss_mask) - 1)
            places.append(row * row_length + start + np.arange(length))
            start += length
    placed = [rows[index] for grid_row in grid for index in grid_row]
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        predicting=_join(predicting, np.int64),
        places=_join(places or [np.zeros(1, np.int64)], np.int64),
        lengths=tuple(len(row.token_ids) for row in placed) or (1,),
        tokens=_completion_tokens(placed, seed),
        routes=_routes(placed),
    )


def uniform_numbers(seed: int, trajectory_id: int, count: int) -> NDArray[np.float32]:
    """Return numbers in [0, 1) that belong to a trajectory's tokens, whatever micro-batch they are in.

    Philox is a counter-based generator: a key names a stream of its own.
    """
    key = np.array([seed, trajectory_id], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count, dtype=np.float32)


def _completion_tokens(placed: Sequence[Trajectory], seed: int) -> CompletionTokens:
    lengths = [len(row.rollout_logprobs) for row in placed]
    num_candidates, num_drawn = (
        max((getattr(row, name).shape[1] for row in placed), default=0)
        for name in ("candidate_ids", "candidate_rollout_logprobs")
    )

    def of_each(name: str, dtype: type = np.float32) -> Tensor:
        values = [np.full(length, getattr(row, name)) for row, length in zip(placed, lengths, strict=True)]
        return _join(values, dtype)

    uniform = [uniform_numbers(seed, row.trajectory_id, row.num_sampled)[row.positions] for row in placed]
    return CompletionTokens(
        target_ids=_join([row.token_ids[row.loss_mask != 0] for row in placed], np.int64),
        rollout_logprobs=_join([row.rollout_logprobs for row in placed], np.float32),
        candidate_ids=_join([row.candidate_ids for row in placed], np.int64, num_candidates),
        candidate_rollout_logprobs=_join([row.candidate_rollout_logprobs for row in placed], np.float32, num_drawn),
        scores=_join_scores([row.scores for row in placed]),
        trajectory=_join([np.full(length, index) for index, length in enumerate(lengths)], np.int64),
        position=_join([row.positions for row in placed], np.int64),
        length=_join([np.full(length, row.num_sampled) for row, length in zip(placed, lengths, strict=True)], np.int64),
        uniform=_join(uniform, np.float32),
        task_advantage=of_each("task_advantage"),
        reward=of_each("reward"),
        weight=of_each("weight"),
        turn=_join([row.turns for row in placed], np.int64),
        privileged=of_each("privileged", np.bool_),
    )


def _routes(placed: Sequence[Trajectory]) -> tuple[RoutedTokens, ...]:
    ends = np.cumsum([len(row.rollout_logprobs) for row in placed])
    routes = []
    for name in dict.fromkeys(row.route for row in placed):
        routed = [(row, end) for row, end in zip(placed, ends, strict=True) if row.route == name]
        places = [np.arange(end - len(row.rollout_logprobs), end) for row, end in routed]
        scores = _join_scores([row.wide_scores for row, _ in routed])
        routes.append(RoutedTokens(name, _join(places, np.int64), scores))
    return tuple(routes)


def _rows(batch: pa.RecordBatch, task_advantages: Iterator[float], weights: Iterator[float]) -> list[Trajectory]:
    logprobs = ragged(batch, "rollout_logprobs")
    nothing = Ragged(np.empty((len(logprobs.values), 0), np.float32), logprobs.offsets)
    columns = {
        name: ragged(batch, name) if name in batch.schema.names else nothing
        for name in ("token_ids", "loss_mask", "rollout_logprobs", "candidate_ids", "candidate_rollout_logprobs")
    }
    scores: dict[str, dict[str, Ragged]] = {model: {} for model in models_in(batch.schema)}
    wide_scores: dict[str, dict[str, Ragged]] = {model: {} for model in scores}
    for signal in find_signals(signal_paths(batch.schema)):
        for model, signals in (wide_scores if signal.width == "model" else scores).items():
            if not signal.is_shared and signal.column(model) in batch.schema.names:
                signals[signal.name] = ragged(batch, signal.column(model))
    strict = strict_tokens(batch)
    rows = [
        Trajectory(
            trajectory_id=batch["trajectory_id"][row].as_py(),
            episode_id=batch["episode_id"][row].as_py(),
            turn=batch["turn"][row].as_py(),
            route=batch["teacher"][row].as_py(),
            task_advantage=next(task_advantages),
            weight=next(weights),
            privileged=batch["sampler"][row].as_py() != STUDENT,
            reward=math.nan if (reward := batch["reward"][row].as_py()) is None else reward,
            scores=_pick(scores, row),
            wide_scores=_pick(wide_scores, row),
            **{name: column[row] for name, column in columns.items()},
        )
        for row in range(batch.num_rows)
    ]
    if strict is None:
        return rows
    of_rows = np.split(strict, logprobs.offsets[1:-1])
    return [only(row, keep) for row, keep in zip(rows, of_rows, strict=True)]


def only(row: Trajectory, keep: NDArray[np.bool_]) -> Trajectory:
    """Return the trajectory with some of its completion tokens; the others are read and not learned from.

    `keep` is [completion_tokens].
    """
    loss_mask = row.loss_mask.copy()
    loss_mask[np.flatnonzero(loss_mask)[~keep]] = 0
    return replace(
        row,
        loss_mask=loss_mask,
        strict=keep,
        rollout_logprobs=row.rollout_logprobs[keep],
        candidate_ids=row.candidate_ids[keep],
        candidate_rollout_logprobs=row.candidate_rollout_logprobs[keep],
        scores=_pick(row.scores, keep),
        wide_scores=_pick(row.wide_scores, keep),
    )


def _pick(scores: Mapping[str, Mapping[str, Any]], chosen: Any) -> dict[str, dict[str, Any]]:
    return {model: {name: values[chosen] for name, values in signals.items()} for model, signals in scores.items()}


def _join(parts: Sequence[NDArray[Any]], dtype: type, width: int | None = None) -> Tensor:
    empty: NDArray[Any] = np.empty((0,) if width is None else (0, width), dtype)
    return torch.from_numpy(np.concatenate([empty, *parts]).astype(dtype, copy=False))


def _join_scores(rows: Sequence[Mapping[str, Mapping[str, NDArray[Any]]]]) -> dict[str, dict[str, Tensor]]:
    if not rows:
        return {}
    return {
        model: {name: _tensor(np.concatenate([row[model][name] for row in rows])) for name in signals}
        for model, signals in rows[0].items()
    }


def _tensor(values: NDArray[Any]) -> Tensor:
    """Return the same numbers; uint16 holds bfloat16's bits, which NumPy cannot."""
    joined = torch.from_numpy(values)
    return joined.view(torch.bfloat16) if joined.dtype == torch.uint16 else joined
