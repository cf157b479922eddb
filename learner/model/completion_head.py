"""The LM head and the objective in one walk over completion positions.

A chunk of logits is computed, judged and turned into gradients at once: three products with the head's weight per
chunk, none of them computed again, and at most one chunk of [chunk, vocabulary] logits alive. The backward pass only
multiplies what the walk has accumulated.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cluster.config.run_config import Config
from cluster.config.stages import HeadDtype
from cluster.models.lm_head import LmHead, load_lm_head
from learner.batching.micro_batch import MicroBatch, RoutedTokens
from learner.loss.kernels.interface import RowKernels
from learner.loss.objective import Objective
from learner.loss.softmax import student_facts
from learner.loss.tokens import StudentFacts, TokenResults
from learner.model.projection import LogitScaling, Projection, Treatment

TeacherHeads = Mapping[str, Mapping[str, LmHead]]  # route -> model of the objective's target -> its head


def load_teacher_heads(config: Config, device: torch.device) -> TeacherHeads:
    """Read the heads that the run's objective needs, each once; none unless it compares whole distributions.

    Raises:
        ModelError: a teacher's head cannot be read.
    """
    if config.objective.support != "full":
        return {}
    names = {
        route: {model: config.scoring_teacher(model, route) for model in config.objective.models}
        for route in config.routes
    }
    loaded = {}
    for name in sorted({name for of_route in names.values() for name in of_route.values()}):
        teacher = config.teachers[name]
        head = load_lm_head(teacher.model, teacher.trust_remote_code, teacher.engine.dtype)
        loaded[name] = head.to(device)
    return {route: {model: loaded[name] for model, name in of_route.items()} for route, of_route in names.items()}


# Float32 logits alive at once, of each model. Every chunk reads and writes the whole gradient of the weight: for 1,024
# tokens of 151,936 on a CPU, the products take 18 % longer in chunks of 128 than in one, 7 % in 256, 1 % in 441.
CPU_CHUNK_LOGITS = 1 << 26  # 256 MiB
GPU_CHUNK_LOGITS = 1 << 28  # 1 GiB: a GPU needs larger products to be busy

Walk = Callable[[Projection], TokenResults]


@dataclass(frozen=True)
class Evaluation:
    """What came of the completion tokens of one micro-batch; float32."""

    loss: Tensor  # scalar: the sum of the losses, the only part with a gradient
    losses: Tensor  # [completion_tokens]
    logprobs: Tensor  # [completion_tokens] of the written tokens under the current student
    entropy: Tensor  # [completion_tokens] of the current student over the whole vocabulary
    candidate_mass: Tensor  # [completion_tokens] the current student's probability of all candidates together


class CompletionHead(nn.Module):
    """Maps hidden states of completion positions to losses.

    It holds the head's own parameters a second time, as its direct members: ZeRO-3 gathers a parameter around the
    forward and backward of the module that owns it, once per micro-batch on every rank however many chunks there are.

    Args:
        linear: the model's own head.
        scaling: what the model does to its product.
        dtype: of the logits; None: float32 where it costs nothing.
    """

    def __init__(self, linear: nn.Linear, scaling: LogitScaling, dtype: HeadDtype | None = None) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias: Tensor | None = linear.bias
        self.scaling = scaling
        self.rounds_logits = None if dtype is None else dtype != "float32"
        self.chunk_tokens: int | None = None  # None: what the device's CHUNK_LOGITS allow

    def forward(
        self, hidden: Tensor, batch: MicroBatch, objective: Objective | None, teacher_heads: TeacherHeads
    ) -> tuple[Tensor, ...]:
        """Return Evaluation's fields as a plain tuple, which DeepSpeed's hooks can look into.

        Args:
            hidden: [completion_tokens, width] of the places that predict the completion tokens.
            batch: the micro-batch, on the same device.
            objective: what to minimise; None: the losses are 0.
            teacher_heads: of the batch's routes, where hidden states were shipped.
        """
        with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        chunk_tokens = self.chunk_tokens or chunk_size(len(self.weight), hidden.device)

        def walk(projection: Projection) -> TokenResults:
            if objective is None or not len(batch.tokens):
                return _without_losses(run_first_pass(projection, batch, chunk_tokens))
            return evaluate_objective(projection, batch, objective, teacher_heads, chunk_tokens)

        apply: Callable[..., tuple[Tensor, ...]] = ObjectiveFunction.apply
        rounds = hidden.device.type == "cpu" if self.rounds_logits is None else self.rounds_logits
        return apply(hidden, self.weight, self.bias, Treatment(self.scaling, rounds), with_gradient, walk)


class ObjectiveFunction(torch.autograd.Function):
    """Hands autograd the gradients that the walk has accumulated."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        treatment: Treatment,
        with_gradient: bool,
        walk: Walk,
    ) -> tuple[Tensor, ...]:
        projection = Projection(hidden, weight, bias, treatment, with_gradient)
        found = walk(projection)
        columns = (found.losses, found.student.logprobs, found.student.entropy, found.candidate_mass)
        ctx.gradients, ctx.dtype = projection.gradients, weight.dtype
        ctx.mark_non_differentiable(*columns)
        ctx.set_materialize_grads(False)
        return found.losses.sum(), *columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_columns: None) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradients of one forward are handed out once"
        return *gradients.times(loss_gradient, ctx.dtype), None, None, None


def evaluate_objective(
    projection: Projection, batch: MicroBatch, objective: Objective, teacher_heads: TeacherHeads, chunk_tokens: int
) -> TokenResults:
    """Return what the objective makes of the batch's tokens; the gradients go into the projection."""
    tokens = batch.tokens
    first_pass = (
        run_first_pass(projection, batch, chunk_tokens, objective.kernels) if objective.needs_first_pass else None
    )
    plan = objective.plan(tokens, first_pass)
    losses, mass, logprobs, entropy = (torch.zeros_like(tokens.rollout_logprobs) for _ in range(4))
    for chunk in _chunks(batch, chunk_tokens):
        places = chunk.places
        found = objective.evaluate(
            projection.logits(places),
            tokens[places],
            plan[places],
            {model: teacher_heads[chunk.route][model].logits(hidden) for model, hidden in chunk.hidden.items()},
            with_gradient=projection.gradients is not None,
        )
        if found.logits_gradient is not None:
            projection.backward(places, found.logits_gradient)
        losses[places], mass[places] = found.losses, found.candidate_mass
        logprobs[places], entropy[places] = found.student.logprobs, found.student.entropy
    return TokenResults(losses, StudentFacts(logprobs, entropy), mass, None)


def run_first_pass(
    projection: Projection, batch: MicroBatch, chunk_tokens: int, kernels: RowKernels | None = None
) -> StudentFacts:
    """Return what the student says of the batch's tokens."""
    logprobs, entropy = (torch.zeros_like(batch.tokens.rollout_logprobs) for _ in range(2))
    for chunk in _chunks(batch, chunk_tokens):
        found = student_facts(projection.logits(chunk.places), batch.tokens.target_ids[chunk.places], kernels)
        logprobs[chunk.places], entropy[chunk.places] = found.logprobs, found.entropy
    return StudentFacts(logprobs, entropy)


def chunk_size(vocabulary_size: int, device: torch.device) -> int:
    """Return how many tokens' logits may live at once."""
    return max(1, (CPU_CHUNK_LOGITS if device.type == "cpu" else GPU_CHUNK_LOGITS) // vocabulary_size)


def _chunks(batch: MicroBatch, chunk_tokens: int) -> Iterator[RoutedTokens]:
    """Cut each route's tokens: those of one chunk share their teacher's heads."""
    for route in batch.routes:
        yield from route.split(chunk_tokens)


def _without_losses(student: StudentFacts) -> TokenResults:
    nothing = torch.zeros_like(student.logprobs)
    return TokenResults(nothing, student, nothing.clone(), None)
