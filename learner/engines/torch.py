"""Trains in plain torch in one process: stage 0, and the oracle that the ZeRO engine is held against."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cluster.config.stages import LearnerConfig
from learner.batching.micro_batch import MicroBatch
from learner.checkpointing.shards import flatten, host_copy, unflatten
from learner.engines.base import PausableAdamW, adamw_settings, exchange, paused
from learner.loss.objective import Objective
from learner.loss.tokens import Evaluation
from learner.model.completion_head import TeacherHeads
from learner.model.student import Student


class ReferenceEngine:
    """Implements TrainEngine over one copy of the student and torch's own AdamW and clipping.

    Weights in bfloat16 have float32 masters, to which gradients are added and which the optimizer updates.
    """

    rank = 0
    world_size = 1

    def __init__(self, student: Student, config: LearnerConfig) -> None:
        self.student = student
        self._device = student.head.weight.device
        self._weights = list(student.parameters())
        self._masters = [_master_of(weight) for weight in self._weights]
        self._optimizer = PausableAdamW(self._masters, fused=True, **adamw_settings(config))
        self._max_gradient_norm = config.max_gradient_norm

    def forward(
        self, batch: MicroBatch, objective: Objective | None = None, teacher_heads: TeacherHeads | None = None
    ) -> Evaluation:
        return Evaluation(*self.student(batch.to(self._device), objective, teacher_heads))

    def backward(self, loss: Tensor, is_last: bool) -> None:
        torch.autograd.backward(loss)

    def step(self, learning_rate: float, num_tokens: int) -> float:
        for master in self._masters:
            if master.grad is not None:
                master.grad /= max(1, num_tokens)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        gradient_norm = torch.nn.utils.clip_grad_norm_(self._masters, self._max_gradient_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._update_weights()
        return float(gradient_norm)

    def discard(self, num_tokens: int) -> float:
        with paused(self._optimizer):
            return self.step(0.0, num_tokens)

    @contextmanager
    def full_parameters(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        parameters, form = dict(self.student.causal_lm.named_parameters()), self.student.checkpoint_format
        yield form.convert({name: parameters[name].detach() for name in form.parameters_of(names)})

    def masters(self) -> Sequence[Tensor]:
        return self._masters

    @contextmanager
    def holding(self, weights: Sequence[Tensor]) -> Iterator[None]:
        exchange(self._masters, weights)
        self._update_weights()
        try:
            yield
        finally:
            exchange(self._masters, weights)
            self._update_weights()

    def snapshot(self) -> dict[str, Tensor]:
        return host_copy(flatten(self._masters, self._optimizer.state_dict()["state"]))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        weights, optimizer = unflatten(state, self._masters)
        with torch.no_grad():
            for master, saved in zip(self._masters, weights, strict=True):
                master.copy_(saved)
        self._update_weights()
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": optimizer})

    @torch.no_grad()
    def _update_weights(self) -> None:
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight is not master:
                weight.copy_(master)


def _master_of(weight: Tensor) -> Tensor:
    """Return the weight itself if it is float32, else a float32 copy that takes each backward's gradient."""
    if weight.dtype == torch.float32:
        return weight
    master = weight.detach().float()

    def take(computed: Tensor) -> None:
        assert computed.grad is not None, "called when it has been added"
        gradient = computed.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        computed.grad = None

    weight.register_post_accumulate_grad_hook(take)
    return master
