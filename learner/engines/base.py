"""Defines what a training engine does for one rank, whatever shards the model underneath."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from cluster.config.stages import LearnerConfig
from learner.batching.micro_batch import MicroBatch
from learner.loss.objective import Objective
from learner.loss.tokens import Evaluation
from learner.model.completion_head import TeacherHeads
from learner.model.student import Student


class TrainEngine(Protocol):
    """Forward, backward, step, whole parameters, and checkpoints.

    Methods are collective: every rank calls the same ones in the same order.
    """

    rank: int
    world_size: int
    student: Student

    def forward(
        self, batch: MicroBatch, objective: Objective | None = None, teacher_heads: TeacherHeads | None = None
    ) -> Evaluation:
        """Evaluate the completion tokens under the current weights; without an objective, the losses are 0."""

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add this rank's part of the step's summed loss; gradients of all parts and ranks add up."""

    def step(self, learning_rate: float, num_tokens: int) -> float:
        """Divide the gradients by the step's tokens, clip them, update the weights; return the norm before clipping."""

    def discard(self, num_tokens: int) -> float:
        """Do as `step` does, but leave the weights as they are."""

    def full_parameters(self, names: Sequence[str]) -> AbstractContextManager[dict[str, Tensor]]:
        """Give whole tensors by their names in the student's checkpoint for as long as the context lasts.

        All tensors that one parameter becomes may come with each of them.
        """

    def masters(self) -> Sequence[Tensor]:
        """Return the float32 weights that this rank's optimizer updates, as they are cut; not collective."""

    def holding(self, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Let the student have other weights, cut as `masters`, while the context lasts; they hold its own meanwhile.

        Gradients that were added up stay as they are; there is no forward or step inside.
        """

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy, in host memory, of this rank's part of what training changes."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a snapshot of a group with as many ranks; raise CheckpointError if it is of another model."""


EXCHANGED_VALUES = 1 << 26  # at once, so that no second copy of the weights lives


@torch.no_grad()
def exchange(some: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Swap the values of tensors of the same shapes."""
    for one, other in zip(some, others, strict=True):
        for ours, theirs in zip(
            one.view(-1).split(EXCHANGED_VALUES), other.view(-1).split(EXCHANGED_VALUES), strict=True
        ):
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)


class PausableAdamW(torch.optim.AdamW):
    """AdamW that can sit out a step, so that an engine's own step measures the gradient and clears it."""

    paused = False

    def step(self, closure: Any = None) -> Any:
        return None if self.paused else super().step(closure)


class Pausable(Protocol):
    """An optimizer that can sit out a step."""

    paused: bool


@contextmanager
def paused(optimizer: Pausable) -> Iterator[None]:
    """Let the optimizer sit out the steps of a `with` statement, whatever ends it."""
    optimizer.paused = True
    try:
        yield
    finally:
        optimizer.paused = False


def adamw_settings(config: LearnerConfig) -> dict[str, Any]:
    """Return AdamW's arguments; the rate is set anew at every step."""
    return {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
