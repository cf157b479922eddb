"""Keeps a step's trajectories on the driver while they arrive: which may be learned from, and where they are."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.config.objective import ObjectiveConfig
from cluster.contracts.batches import BatchHandle
from learner.batching.plan import Grid

EPSILON = 1e-4  # added to the deviation, which is 0 where all samples have the same reward


def group_advantages(rewards: Sequence[float | None], divide_by_deviation: bool) -> list[float]:
    """Return each sample's reward minus the mean of its prompt's samples, over their deviation if asked for (GRPO).

    Samples without a reward, and one that is alone with its, have advantage 0.

    Example:
        >>> group_advantages([1.0, 0.0, None], divide_by_deviation=False)
        [0.5, -0.5, 0.0]
    """
    given = np.array([reward for reward in rewards if reward is not None], np.float64)
    if len(given) < 2:
        return [0.0] * len(rewards)
    deviation = given.std(ddof=1) + EPSILON if divide_by_deviation else 1.0
    return [0.0 if reward is None else float((reward - given.mean()) / deviation) for reward in rewards]


@dataclass(frozen=True)
class RankShare:
    """Tells one rank what it does in one round."""

    references: tuple[Any, ...]  # to wire bytes; inside a dataclass, so Ray hands them over unresolved
    task_advantages: tuple[float, ...]  # of the rows of `references`, in order
    grids: tuple[Grid, ...]  # indices count the rows of `references` in order
    weights: tuple[float, ...] = ()  # of the rows of `references`, in order; empty: all are 1
    step: int = 0  # optimizer step, from 0, at which weights have what their schedules say
    step_means: Mapping[str, float] = field(default_factory=dict)  # term -> mean advantage over the whole step


@dataclass
class BatchBuffer:
    """Numbers a step's trajectories in the order of arrival and holds back those whose advantage is not known yet."""

    objective: ObjectiveConfig  # says whether a task reward is compared within a prompt's samples
    samples_per_prompt: int  # episodes whose ids, divided by this number, are equal belong together
    step: int = 0  # optimizer step, from 0
    num_loss_tokens: int = 0  # completion tokens that are learned from: the step's loss is divided by them
    step_means: Mapping[str, float] = field(default_factory=dict)  # for the ranks, once they are known
    _handles: list[BatchHandle] = field(default_factory=list)
    _places: list[tuple[int, int]] = field(default_factory=list)  # of each trajectory: batch, row in it
    _advantages: list[list[float]] = field(default_factory=list)  # of each batch's rows
    _tokens: Counter[str] = field(default_factory=Counter)  # of `num_loss_tokens`, by teacher
    _held: list[int] = field(default_factory=list)  # until the step's last batch is in, if the objective needs that
    _groups: dict[int, list[list[int]]] = field(default_factory=lambda: defaultdict(list))  # rows of each episode

    @property
    def num_rows(self) -> int:
        """Return how many trajectories have arrived."""
        return len(self._places)

    def add(self, handle: BatchHandle) -> list[int]:
        """Take in a batch and return the trajectories that may be learned from now, of this batch or earlier ones."""
        released = self._take_in(handle)
        if not self.objective.needs.whole_step:
            return released
        self._held += released
        return []

    def _take_in(self, handle: BatchHandle) -> list[int]:
        first = len(self._places)
        self._places += [(len(self._handles), row) for row in range(len(handle.trajectory_ids))]
        self._handles.append(handle)
        self._advantages.append([0.0] * len(handle.trajectory_ids))
        num_tokens = sum(handle.num_loss_tokens or handle.num_completion_tokens)
        self.num_loss_tokens += num_tokens
        self._tokens[handle.teacher] += num_tokens
        divides = self.objective.needs.divides_by_deviation
        if divides is None:
            return list(range(first, len(self._places)))
        released = []
        rows = dict[int, list[int]]()  # of each episode; a batch has all or none
        for index, episode_id in enumerate(handle.episodes, start=first):
            rows.setdefault(episode_id, []).append(index)
        for episode_id, of_episode in rows.items():
            key = episode_id // self.samples_per_prompt
            self._groups[key].append(of_episode)
            if len(self._groups[key]) == self.samples_per_prompt:
                released += self._release(key, divides)
        return released

    def rest(self) -> list[int]:
        """Return the trajectories still held back once no batch follows: of prompts without all their samples."""
        held, self._held = self._held, []
        divides = self.objective.needs.divides_by_deviation
        if divides is None:
            return held
        return held + [index for key in list(self._groups) for index in self._release(key, divides)]

    def num_tokens(self, indices: Iterable[int]) -> dict[int, int]:
        """Return the prompt and completion tokens of trajectories."""
        places = {index: self._places[index] for index in indices}
        return {index: self._handles[batch].num_tokens[row] for index, (batch, row) in places.items()}

    def share(self, grids: tuple[Grid, ...]) -> RankShare:
        """Return what a rank needs for its micro-batches: the batches that they touch, their rows counted anew."""
        used = sorted({self._places[index][0] for grid in grids for grid_row in grid for index in grid_row})
        first_rows, count = {}, 0
        for batch in used:
            first_rows[batch] = count
            count += len(self._handles[batch].trajectory_ids)

        def local(index: int) -> int:
            batch, row = self._places[index]
            return first_rows[batch] + row

        return RankShare(
            tuple(self._handles[batch].reference for batch in used),
            tuple(advantage for batch in used for advantage in self._advantages[batch]),
            tuple(tuple(tuple(local(index) for index in grid_row) for grid_row in grid) for grid in grids),
            tuple(weight for batch in used for weight in self._weights(self._handles[batch])),
            self.step,
            self.step_means,
        )

    def _weights(self, handle: BatchHandle) -> list[float]:
        """Return the weights of a batch's rows; none where every token counts as one.

        A teacher of share s and n of the step's N tokens has s N / n: its mean loss counts s, whatever n is.
        """
        shares, n = self.objective.token_weights.teacher_shares, self._tokens[handle.teacher]
        if shares == "tokens":
            return []
        given = {name: 1.0 if shares == "equal" else shares[name] for name, tokens in self._tokens.items() if tokens}
        share = given.get(handle.teacher, 0.0) / sum(given.values()) if given else 0.0
        return [share * self.num_loss_tokens / max(n, 1)] * len(handle.trajectory_ids)

    def _release(self, key: int, divide_by_deviation: bool) -> list[int]:
        """Compare the samples of one prompt, and return them; all rows of an episode have its advantage."""
        group = self._groups.pop(key)
        lasts = [self._places[rows[-1]] for rows in group]
        rewards = [self._handles[batch].rewards[row] for batch, row in lasts]
        for rows, advantage in zip(group, group_advantages(rewards, divide_by_deviation), strict=True):
            for batch, row in (self._places[index] for index in rows):
                self._advantages[batch][row] = advantage
        return [index for rows in group for index in rows]
