"""Terms over the whole vocabulary: block by block of rows, each read once, worked on in the cache and written once."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cluster.config.objective import AnyTerm, DivergenceTerm, PolicyGradientTerm, Target
from learner.loss.exact import EXACT_DIVERGENCES, Distribution, Spare, reverse_kl
from learner.loss.softmax import log_softmax, row_blocks
from learner.loss.terms import Chunk, parameter_of, sum_of_terms, token_weights
from learner.loss.tokens import CompletionTokens, StudentFacts, TokenPlan, TokenResults


def evaluate_full(
    terms: Mapping[str, AnyTerm],
    logits: Tensor,
    tokens: CompletionTokens,
    plan: TokenPlan,
    model_logits: Mapping[str, Tensor],
) -> TokenResults:
    """Evaluate the terms and overwrite the logits by the gradient.

    Where vocabularies differ in size, divergences compare student and models on the tokens that all of them have, each
    renormalised there, and have no gradient by the others. Written tokens keep the student's own normaliser.
    """
    blocks = row_blocks(logits)
    scratch = _Scratch(logits[blocks[0]], min(values.shape[-1] for values in [logits, *model_logits.values()]))
    parts = []
    for rows in blocks:
        models = {model: values[rows] for model, values in model_logits.items()}
        parts.append(_Block(logits[rows], tokens[rows], plan[rows], models, scratch).evaluate(terms))
    return TokenResults(
        torch.cat([part.losses for part in parts]),
        StudentFacts(*(torch.cat([getattr(part.student, name) for part in parts]) for name in ("logprobs", "entropy"))),
        torch.zeros_like(logits[:, 0]),
        logits,
    )


class _Scratch:
    """Memory for one block, used for all."""

    def __init__(self, block: Tensor, width: int) -> None:
        self.logprobs, self.probabilities = torch.empty_like(block), torch.empty_like(block)
        self.target, self.first, self.second = (block.new_empty(len(block), width) for _ in range(3))


class _Block:
    """Some rows. `logits` is read by the constructor and free afterwards: the gradient is gathered there."""

    def __init__(
        self,
        logits: Tensor,
        tokens: CompletionTokens,
        plan: TokenPlan,
        model_logits: Mapping[str, Tensor],
        scratch: _Scratch,
    ) -> None:
        self._gradient, self._tokens, self._plan = logits, tokens, plan
        self._model_logits, self._scratch = model_logits, scratch
        self._width = scratch.target.shape[-1]
        logprobs = log_softmax(logits, scratch.logprobs)
        self._student = Distribution(logprobs, torch.exp(logprobs, out=scratch.probabilities[: len(logits)]))
        self._written = logprobs.gather(-1, tokens.target_ids[:, None])
        self._entropy = -torch.linalg.vecdot(logprobs, self._student.probabilities)

    def evaluate(self, terms: Mapping[str, AnyTerm]) -> TokenResults:
        """Evaluate all terms."""
        shared, mass = self._student, None
        if self._width < self._gradient.shape[-1]:
            shared, mass = shared.renormalise(self._width)
        others = {name: term for name, term in terms.items() if not isinstance(term, DivergenceTerm)}
        losses = self._divergences([term for term in terms.values() if isinstance(term, DivergenceTerm)], shared)
        if others:
            exact_kl = {
                name: reverse_kl(shared, self._target(term.target), self._spare())[0]
                for name, term in others.items()
                if isinstance(term, PolicyGradientTerm) and term.baseline == "kl"
            }
            chunk = Chunk(self._tokens, self._plan, self._written.clone(), exact_kl=exact_kl)
            of_others, by_written = sum_of_terms(others, chunk)
            losses = losses + of_others
            self._add_gradient_of_written(by_written, mass)
        facts = StudentFacts(self._written[:, 0], self._entropy)
        return TokenResults(losses, facts, torch.zeros_like(losses), self._gradient)

    def _divergences(self, terms: list[DivergenceTerm], student: Distribution) -> Tensor:
        """Return the weighted sum of the divergences, [n], and make its gradient the block's."""
        losses = torch.zeros_like(self._entropy)
        shared = self._gradient[:, : self._width]
        self._gradient[:, self._width if terms else 0 :] = 0
        for number, term in enumerate(terms):
            divergence = EXACT_DIVERGENCES[term.divergence]
            found, gradient = divergence(student, self._target(term.target), self._spare(), parameter_of(term))
            weights = token_weights(term, self._tokens, self._plan, self._written[:, 0]).to(losses.dtype)
            losses += found * weights
            if number:
                shared.addcmul_(gradient, weights[:, None])
            else:
                torch.mul(gradient, weights[:, None], out=shared)
        return losses

    def _add_gradient_of_written(self, by_written: Tensor, mass: Tensor | None) -> None:
        """Add to the gradient by the logits that by the written log-probabilities, [n, 1]."""
        probabilities = self._student.probabilities
        if mass is not None:
            probabilities[:, : self._width].mul_(mass)
        self._gradient.addcmul_(probabilities, -by_written)
        self._gradient.scatter_add_(-1, self._tokens.target_ids[:, None], by_written)

    def _target(self, target: Target) -> Tensor:
        """Return the target's log-probabilities, normalised over the shared tokens, in the scratch."""
        (first, share), *others = [(model, share) for model, share in target.items() if share]
        mixed = self._scratch.first[: len(self._gradient)]
        torch.mul(self._model_logits[first][:, : self._width], share, out=mixed)
        for model, share in others:
            mixed.add_(self._model_logits[model][:, : self._width], alpha=share)
        return log_softmax(mixed, self._scratch.target)

    def _spare(self) -> Spare:
        rows = len(self._gradient)
        return Spare(self._scratch.first[:rows], self._scratch.second[:rows])
