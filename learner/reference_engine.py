"""A training engine of plain torch in one process: the oracle that the ZeRO engine is held against."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cluster.contracts.config import LearnerConfig
from learner.completion_head import Evaluation
from learner.engine import PausableAdamW, adamw_settings, paused
from learner.micro_batch import MicroBatch
from learner.model import Student
from learner.objective.objective import Objective
from learner.teacher_heads import TeacherHeads

STATE_FILE = "state.pt"


class ReferenceEngine:
    """TrainEngine over one copy of the student and torch's own AdamW and clipping."""

    rank = 0
    world_size = 1

    def __init__(self, student: Student, config: LearnerConfig) -> None:
        self.student = student
        self._optimizer = PausableAdamW(student.parameters(), **adamw_settings(config))
        self._max_gradient_norm = config.max_gradient_norm

    def forward(
        self, batch: MicroBatch, objective: Objective | None = None, teacher_heads: TeacherHeads | None = None
    ) -> Evaluation:
        """Evaluate the completion tokens under the current weights; without an objective, the losses are 0."""
        return Evaluation(*self.student(batch, objective, teacher_heads))

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add one micro-batch's part of the step's summed loss."""
        torch.autograd.backward(loss)

    def step(self, learning_rate: float, num_tokens: int) -> float:
        """Divide by the tokens, clip, update the weights, clear the gradients; return the norm before clipping."""
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                parameter.grad /= max(1, num_tokens)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self._max_gradient_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(gradient_norm)

    def discard(self, num_tokens: int) -> float:
        """Do as `step` does, but leave the weights as they are."""
        with paused(self._optimizer):
            return self.step(0.0, num_tokens)

    @contextmanager
    def full_parameters(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Give parameters by Hugging Face name."""
        parameters = dict(self.student.causal_lm.named_parameters())
        yield {name: parameters[name].detach() for name in names}

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state."""
        state = {"student": self.student.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote."""
        state = torch.load(folder / STATE_FILE, weights_only=True)
        self.student.load_state_dict(state["student"])
        self._optimizer.load_state_dict(state["optimizer"])
