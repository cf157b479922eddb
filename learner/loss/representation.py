"""Draws hidden states of the student to a target's (OPRD, and its successors LastOPD and RIDE).

Of a token, the states are those of the row before it, which predicts it. Its loss is the mean over the layers l of

    1/width |P h_l - sum of a_j P_j h_l(j)|^2        a_j: the target's coefficients, which sum to 1

with identities in the place of P where there is no projection bank. The form is that of OPRD's branch `main`
(github.com/ShenzhiYang2000/OPRD), but for the rows, which are there those that have read the token; with
`normalise = "l2"`, (2 - 2 cos)/width, that of its branch OPRD-Bridge. RIDE (arXiv 2609.36484) is a target of teacher
and base. Nothing here depends on other tokens, so how a step is cut changes nothing.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from cluster.config.terms import RepresentationTerm
from cluster.models.hidden_layers import chosen_layers, load_bank
from learner.loss.softmax import at_least_float32
from learner.loss.term import Chunk, LossTerm, token_weights

Scores = Mapping[str, Mapping[str, Tensor]]  # model -> signal -> [n, width]
SMALLEST_SCALE = 1e-6  # of a root mean square or a length; states of 0 would divide by 0


# Losses [n]; errors [n], the student's distance from the target over the target's length, mean over layers and terms;
# layer -> gradient [n, width] of the summed losses by the student's states.
Alignment = tuple[Tensor, Tensor, dict[int, Tensor]]


class RepresentationLoss(LossTerm):
    """Compares hidden states; it reads no probabilities, and has no gradient by them."""

    config: RepresentationTerm

    def __init__(self, name: str, config: RepresentationTerm, temperature: float) -> None:
        """Read the projection bank; raise ModelError if there is one and it cannot be read."""
        self.config = config
        self._bank = None if config.bank is None else load_bank(config.bank)

    def layers(self, depth: int) -> tuple[int, ...]:
        """Return the layers of a student of so many that it compares."""
        return chosen_layers(self.config.layers, depth)

    def compare(self, states: Mapping[int, Tensor], scores: Scores, depth: int) -> tuple[Tensor, Tensor]:
        """Return losses, which autograd follows to the student's states, and errors, both [n]."""
        layers = self.layers(depth)
        student = torch.stack([self._project(layer, states[layer]) for layer in layers], dim=1)  # [n, layers, width]
        target = self._target(scores, student)
        error = torch.linalg.vector_norm(student.detach() - target, dim=-1) / _lengths(target)
        if self.config.normalise == "rms":
            scale = target.square().mean(-1, keepdim=True).sqrt().clamp(min=SMALLEST_SCALE)
            student, target = student / scale, target / scale
        elif self.config.normalise == "l2":
            student, target = (functional.normalize(part, dim=-1, eps=SMALLEST_SCALE) for part in (student, target))
        return (student - target).square().mean((1, 2)), error.mean(1)

    def _project(self, layer: int, states: Tensor) -> Tensor:
        return states if self._bank is None else self._bank.project("student", layer, states)

    def _target(self, scores: Scores, student: Tensor) -> Tensor:
        """Return the mixture of the models' states, as large as the student's."""
        signal = "hidden" if self.config.reads_last else "layers"
        sent = {model: scores[model][signal].to(student.dtype) for model in self.config.target}
        mixed = torch.stack([share * sent[model] for model, share in self.config.target.items()]).sum(0)
        return mixed.view_as(student)


def align(
    terms: Mapping[str, RepresentationLoss], states: Mapping[int, Tensor], scores: Scores, chunk: Chunk, depth: int
) -> Alignment:
    """Evaluate all representation terms on the student's states, layer -> [n, width] of each layer that they name."""
    leaves = {layer: at_least_float32(values.detach()).requires_grad_() for layer, values in states.items()}
    errors = []
    with torch.enable_grad():
        losses = sum((0.0 * values.sum(-1) for values in leaves.values()), torch.zeros(()))
        for term in terms.values():
            of_term, error = term.compare(leaves, scores, depth)
            losses = losses + of_term * token_weights(term.config, chunk).detach()
            errors.append(error)
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
    return losses.detach(), torch.stack(errors).mean(0), dict(zip(leaves, gradients, strict=True))


def _lengths(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dim=-1).clamp(min=SMALLEST_SCALE)
