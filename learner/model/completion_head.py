"""Computes the LM head and the objective in one walk over completion positions.

A chunk of logits is computed, evaluated and turned into gradients at once: three products with the head's weight per
chunk, none of them computed again, and at most one chunk of [chunk, vocabulary] logits alive. The backward pass only
multiplies what the walk has accumulated.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cluster.config.run_config import Config
from cluster.config.stages import HeadDtype
from cluster.models.lm_head import LmHead, load_teacher_head
from cluster.models.stop_class import merge_ids
from learner.batching.micro_batch import MicroBatch, RoutedTokens
from learner.loss.kernels.interface import RowKernels
from learner.loss.softmax import at_least_float32, read_tokens, temperature_normaliser
from learner.loss.tokens import Evaluation
from learner.model.projection import LogitScaling, Projection

if TYPE_CHECKING:
    from learner.loss.objective import Objective  # given to the calls; loading it is not needed

TeacherHeads = Mapping[str, Mapping[str, LmHead]]  # route -> model of the objective's target -> its head


def load_teacher_heads(config: Config, device: torch.device) -> TeacherHeads:
    """Read the heads that the run's objective needs, each once; none unless it compares whole distributions."""
    needs = config.objective.needs
    if not needs.hidden:
        return {}
    names = {route: {model: config.scoring_teacher(model, route) for model in needs.models} for route in config.routes}
    loaded = {}
    for name in sorted({name for of_route in names.values() for name in of_route.values()}):
        teacher = config.teachers[name]
        head = load_teacher_head(teacher)
        loaded[name] = head.to(device)
    return {route: {model: loaded[name] for model, name in of_route.items()} for route, of_route in names.items()}


def with_updated_head(
    config: Config, heads: TeacherHeads, name: str, update: Callable[[LmHead], LmHead]
) -> TeacherHeads:
    """Return the heads with another one of [teachers.NAME], which `update` makes, once, if the objective has it."""
    of_teacher = [
        head
        for route, models in heads.items()
        for model, head in models.items()
        if config.scoring_teacher(model, route) == name
    ]
    if not of_teacher:
        return heads
    new = update(of_teacher[0])
    return {
        route: {model: new if config.scoring_teacher(model, route) == name else head for model, head in models.items()}
        for route, models in heads.items()
    }


# Float32 logits alive at once, of each model. Every chunk reads and writes the whole gradient of the weight: for 1,024
# tokens of 151,936 on a CPU, the products take 18 % longer in chunks of 128 than in one, 7 % in 256, 1 % in 441.
CPU_CHUNK_LOGITS = 1 << 26  # 256 MiB
GPU_CHUNK_LOGITS = 1 << 28  # 1 GiB: a GPU needs larger products to be busy


class CompletionHead(nn.Module):
    """Maps hidden states of completion positions to losses.

    The module holds the head's own parameters a second time, as its direct members: ZeRO-3 gathers a parameter around
    the forward and backward of the module that owns it, once per micro-batch on every rank, whatever the chunks.
    `dtype` is that of the logits; None: float32 where it costs nothing.
    """

    def __init__(self, linear: nn.Linear, scaling: LogitScaling, dtype: HeadDtype | None = None) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias: Tensor | None = linear.bias
        self.scaling = scaling
        self.rounds_logits = None if dtype is None else dtype != "float32"
        self.chunk_tokens: int | None = None  # None: what the device's CHUNK_LOGITS allow
        self.stop_class: tuple[int, ...] = ()  # ids that count as one token, the first for all

    def forward(
        self,
        hidden: Tensor,
        batch: MicroBatch,
        objective: "Objective | None",
        teacher_heads: TeacherHeads,
        states: Mapping[int, Tensor] | None = None,
        depth: int = 0,
    ) -> tuple[Tensor, ...]:
        """Return Evaluation's fields as a plain tuple, which DeepSpeed's hooks can look into.

        Args:
            hidden: [completion_tokens, width], of the places that predict the completion tokens.
            batch: the micro-batch.
            objective: None: the losses are 0.
            teacher_heads: of the objective's models, where it compares whole distributions.
            states: layer -> as hidden, of the layers that the objective compares with the models'.
            depth: layers of the student.
        """
        with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        chunk_tokens = self.chunk_tokens or chunk_size(len(self.weight), hidden.device)
        rounds = hidden.device.type == "cpu" if self.rounds_logits is None else self.rounds_logits
        scaling = replace(self.scaling, rounds=rounds, stop_class=self.stop_class)
        batch = with_merged_ids(batch, self.stop_class)

        def walk(projection: Projection, states: StudentStates) -> Evaluation:
            if objective is None or not len(batch.tokens):
                return run_first_pass(projection, batch, chunk_tokens)
            return evaluate_objective(projection, batch, objective, teacher_heads, chunk_tokens, states)

        apply: Callable[..., tuple[Tensor, ...]] = ObjectiveFunction.apply
        states = states or {}
        layers = depth, tuple(states)
        return apply(hidden, self.weight, self.bias, scaling, with_gradient, walk, layers, *states.values())


class StudentStates:
    """Holds the student's states of the layers that are compared, and sums up the gradients by them."""

    def __init__(self, layers: tuple[int, tuple[int, ...]], values: Sequence[Tensor], with_gradient: bool) -> None:
        """Take the student's depth and the layers, and of each layer [completion_tokens, width]."""
        self.depth, names = layers
        self._values = dict(zip(names, values, strict=True))
        # In the states' dtype: a token's gradient is written once.
        self.gradients = {layer: torch.zeros_like(state) for layer, state in self._values.items() if with_gradient}

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, chosen: Tensor) -> dict[int, Tensor]:
        return {layer: values[chosen] for layer, values in self._values.items()}

    def backward(self, chosen: Tensor, gradients: Mapping[int, Tensor]) -> None:
        """Take in the gradients by the states of some tokens, which come once."""
        for layer, of_layer in self.gradients.items():
            of_layer[chosen] = gradients[layer].to(of_layer.dtype)


class ObjectiveFunction(torch.autograd.Function):
    """Hands autograd the gradients that the walk has accumulated."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scaling: LogitScaling,
        with_gradient: bool,
        walk: Callable[[Projection, StudentStates], Evaluation],
        layers: tuple[int, tuple[int, ...]],
        *states: Tensor,
    ) -> tuple[Tensor, ...]:
        projection = Projection(hidden, weight, bias, scaling, with_gradient)
        aligned = StudentStates(layers, states, with_gradient)
        result = walk(projection, aligned)
        ctx.gradients, ctx.dtype, ctx.of_states = projection.gradients, weight.dtype, aligned.gradients
        ctx.mark_non_differentiable(*result.columns)
        ctx.set_materialize_grads(False)
        return result.loss, *result.columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_columns: None) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradients of one forward are handed out once"
        of_hidden, of_weight, of_bias = gradients  # overwritten: they are as large as the weight
        by_bias = None if of_bias is None else of_bias.mul_(loss_gradient).to(ctx.dtype)
        by_weight = of_weight.mul_(loss_gradient).to(ctx.dtype)
        by_states, ctx.of_states = [values.mul_(loss_gradient) for values in ctx.of_states.values()], {}
        return of_hidden.mul_(loss_gradient), by_weight, by_bias, None, None, None, None, *by_states


def evaluate_objective(
    projection: Projection,
    batch: MicroBatch,
    objective: "Objective",
    teacher_heads: TeacherHeads,
    chunk_tokens: int,
    states: StudentStates,
) -> Evaluation:
    """Return what the objective makes of the batch's tokens; the gradients go into the projection and the states."""
    tokens, kernels = batch.tokens, objective.kernels
    first_pass = None
    if objective.needs.first_pass:
        first_pass = run_first_pass(projection, batch, chunk_tokens, kernels, objective.temperature)
    plan = objective.plan(tokens, first_pass)
    columns = [torch.zeros_like(tokens.rollout_logprobs) for _ in range(6)]
    for chunk in _chunks(batch, chunk_tokens):
        places = chunk.places
        logits, chosen, of_chosen = projection.logits(places), tokens[places], plan[places]
        models = _model_logits(objective, chunk, teacher_heads)
        if batch.watch is not None:
            batch.watch.see(places, logits, chosen, of_chosen.weights, models)
        result = objective.evaluate(
            logits,
            chosen,
            of_chosen,
            models,
            with_gradient=projection.gradients is not None and objective.reads_logits,
        )
        if result.logits_gradient is not None:
            projection.backward(places, result.logits_gradient)
        if len(states):
            of_chunk = states[places], chunk.scores, chosen, of_chosen
            losses, errors, gradients = objective.align(*of_chunk, result.logprobs, states.depth)
            states.backward(places, gradients)
            result = replace(result, losses=result.losses + losses, state_errors=errors)
        for column, values in zip(columns, result.columns, strict=True):
            column[places] = values
    return Evaluation(columns[0].sum(), *columns)


def _model_logits(objective: "Objective", chunk: RoutedTokens, teacher_heads: TeacherHeads) -> dict[str, Tensor]:
    """Return the models' logits of a chunk's tokens, where the objective compares whole distributions."""
    if not objective.needs.hidden:
        return {}
    return {model: teacher_heads[chunk.route][model].logits(hidden) for model, hidden in chunk.hidden.items()}


def run_first_pass(
    projection: Projection,
    batch: MicroBatch,
    chunk_tokens: int,
    kernels: RowKernels | None = None,
    temperature: float = 1.0,
) -> Evaluation:
    """Return what the student says of the batch's tokens, without losses."""
    losses, logprobs, entropy, mass, sampler = (torch.zeros_like(batch.tokens.rollout_logprobs) for _ in range(5))
    for chunk in _chunks(batch, chunk_tokens):
        places = chunk.places
        target_ids, logits = batch.tokens.target_ids[places], at_least_float32(projection.logits(places))
        normaliser = temperature_normaliser(logits, temperature)
        logprobs[places], entropy[places] = read_tokens(logits, target_ids, kernels)
        sampler[places] = logprobs[places] / temperature - normaliser
    return Evaluation(losses.sum(), losses, logprobs, entropy, mass, sampler)


def with_merged_ids(batch: MicroBatch, stop_class: Sequence[int]) -> MicroBatch:
    """Return the batch with the first id of the class wherever tokens are compared, but not where they are read."""
    if not stop_class:
        return batch
    targets, candidates = (merge_ids(ids, stop_class) for ids in (batch.tokens.target_ids, batch.tokens.candidate_ids))
    return replace(batch, tokens=replace(batch.tokens, target_ids=targets, candidate_ids=candidates))


def chunk_size(vocabulary_size: int, device: torch.device) -> int:
    """Return how many tokens' logits may live at once."""
    return max(1, (CPU_CHUNK_LOGITS if device.type == "cpu" else GPU_CHUNK_LOGITS) // vocabulary_size)


def _chunks(batch: MicroBatch, chunk_tokens: int) -> Iterator[RoutedTokens]:
    """Cut each route's tokens: those of one chunk share their teacher's heads."""
    for route in batch.routes:
        yield from route.split(chunk_tokens)
