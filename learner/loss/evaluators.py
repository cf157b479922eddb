"""Evaluates an objective's terms on a chunk of logits, in three ways: listed tokens, whole rows, whole rows by kernels.

Each returns losses and overwrites the logits by the gradient.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.linalg import vecdot

from cluster.config.objective import Needs
from cluster.config.terms import Target
from learner.loss.divergences import DIVERGENCES, Divergence
from learner.loss.kernels.interface import RowKernels
from learner.loss.softmax import any_softmax, kth_largest, log_softmax, row_blocks
from learner.loss.tails import find_log_tail, gradient_with_tail
from learner.loss.targets import mixed_logits
from learner.loss.term import Chunk, LossTerm, sum_of_terms, token_weights
from learner.loss.tokens import CompletionTokens, Evaluation, TokenPlan

Terms = Mapping[str, LossTerm]
REVERSE_KL = DIVERGENCES["reverse_kl"]


def evaluate_listed(
    terms: Terms,
    needs: Needs,
    logits: Tensor,
    tokens: CompletionTokens,
    plan: TokenPlan,
    with_gradient: bool,
    kernels: RowKernels | None,
) -> Evaluation:
    """Evaluate terms that read sampled tokens and candidates alone: a few numbers per token, which autograd follows."""
    candidates, inside = _candidates(needs, logits, tokens)
    ids = torch.cat([tokens.target_ids[:, None], candidates], dim=-1)
    softmax = any_softmax(logits, ids, kernels)
    log_tail = None if needs.sampled_candidates else find_log_tail(softmax, candidates, inside)
    losses, by_logprobs, by_tail = sum_of_terms(
        terms, Chunk(tokens, plan, softmax.logprobs.clone(), needs.sampled_candidates, inside, log_tail=log_tail)
    )
    gradient = None
    if with_gradient and log_tail is not None and by_tail is not None:
        gradient = gradient_with_tail(softmax, ids, inside, by_logprobs, log_tail, by_tail)
    elif with_gradient:
        gradient = softmax.gradient(ids, by_logprobs)
    probabilities = softmax.logprobs[:, 1:].exp() * (tokens.candidate_ids < logits.shape[-1])  # 0 of padded ones
    if tokens.shared is not None:
        probabilities = probabilities * tokens.shared
    mass = _mass(tokens.candidate_ids, probabilities, needs.sampled_candidates)
    return Evaluation(losses.sum(), losses, softmax.logprobs[:, 0], softmax.entropy, mass, logits_gradient=gradient)


def evaluate_full(
    terms: Terms,
    logits: Tensor,
    tokens: CompletionTokens,
    plan: TokenPlan,
    model_logits: Mapping[str, Tensor],
    with_gradient: bool,
) -> Evaluation:
    """Evaluate the terms over the whole vocabulary, block by block of rows, each read once and worked on in the cache.

    Where vocabularies differ in size, divergences compare student and models on the tokens that all of them have, each
    renormalised there, and have no gradient by the others. Sampled tokens keep the student's own normaliser.
    """
    blocks = row_blocks(logits)
    width = min(values.shape[-1] for values in [logits, *model_logits.values()])
    first = logits[blocks[0]]
    whole, shared = first.new_empty(2, *first.shape), first.new_empty(3, len(first), width)
    parts = []
    for rows in blocks:
        models = {model: values[rows, :width] for model, values in model_logits.items()}
        parts.append(_evaluate_block(terms, logits[rows], tokens[rows], plan[rows], models, (whole, shared)))
    losses, logprobs, entropy = (torch.cat(columns) for columns in zip(*parts, strict=True))
    gradient = logits if with_gradient else None
    mass = torch.zeros_like(losses)
    return Evaluation(losses.sum(), losses, logprobs, entropy, mass, logits_gradient=gradient)


def evaluate_fused(
    terms: Terms,
    logits: Tensor,
    tokens: CompletionTokens,
    plan: TokenPlan,
    model_logits: Mapping[str, Tensor],
    with_gradient: bool,
    kernels: RowKernels,
) -> Evaluation:
    """Evaluate the only term, a divergence over the whole vocabulary, by kernels.

    The logits of mixed models are overwritten by their mixture.
    """
    (term,) = terms.values()
    assert term.divergence is not None, "`takes_fused` says so"
    divergence, parameter = term.divergence
    kernel = divergence.at(parameter).kernel
    assert kernel is not None, "`takes_fused` says so"
    width = min(values.shape[-1] for values in [logits, *model_logits.values()])
    target = mixed_logits(term.config.target, {model: values[:, :width] for model, values in model_logits.items()})
    compared = kernels.compare(logits, target, kernel, parameter)
    sampled = compared.statistics.whole.logprobs(logits.gather(-1, tokens.target_ids[:, None]))[:, 0]
    weights = token_weights(term.config, Chunk(tokens, plan, sampled[:, None])).to(logits.dtype)
    if with_gradient:
        kernels.write_gradient(logits, target, kernel, parameter, compared, weights)
    losses, gradient = compared.losses * weights, logits if with_gradient else None
    entropy, mass = compared.statistics.entropy, torch.zeros_like(losses)
    return Evaluation(losses.sum(), losses, sampled, entropy, mass, logits_gradient=gradient)


def takes_fused(terms: Terms, kernels: RowKernels, logits: Tensor) -> bool:
    """Return whether kernels take these logits, and know the one divergence that is all there is to compute."""
    (term, *others) = terms.values()
    if others or term.divergence is None or not kernels.takes(logits):
        return False
    divergence, parameter = term.divergence
    return kernels.knows(divergence.at(parameter).kernel)


def _evaluate_block(
    terms: Terms,
    logits: Tensor,
    tokens: CompletionTokens,
    plan: TokenPlan,
    models: Mapping[str, Tensor],
    scratch: tuple[Tensor, Tensor],  # [2, rows, vocabulary], [3, rows, width]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses, log-probabilities of the sampled tokens and entropies, each [n]."""
    (of_logprobs, of_probabilities), (of_target, *_) = scratch
    spare, width = scratch[1][1:, : len(logits)], of_target.shape[-1]
    logprobs = log_softmax(logits, of_logprobs)  # the logits are free from here on, and the gradient is gathered there
    probabilities = torch.exp(logprobs, out=of_probabilities[: len(logits)])
    sampled, entropy = logprobs.gather(-1, tokens.target_ids[:, None]), -vecdot(logprobs, probabilities)
    student, p, mass = logprobs[:, :width], probabilities[:, :width], None
    if width < logits.shape[-1]:
        mass = p.sum(-1, keepdim=True)
        student, p = student.sub_(mass.log()), p.div_(mass)

    def compare(target: Target, divergence: Divergence, parameter: float) -> tuple[Tensor, Tensor]:
        log_target = log_softmax(mixed_logits(target, models, out=spare[0]), of_target)
        return divergence.exact(student, p, log_target, parameter, spare)

    def mean(target: Target, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        log_target = log_softmax(mixed_logits(target, models, out=spare[0]), of_target)
        return vecdot(p, function(log_target, student))

    losses, by_logits = torch.zeros_like(entropy), logits[:, :width]
    compared = [(term.config, term.divergence) for term in terms.values() if term.divergence is not None]
    logits[:, width if compared else 0 :] = 0
    for number, (config, divergence) in enumerate(compared):
        values, gradient = compare(config.target, *divergence)
        weights = token_weights(config, Chunk(tokens, plan, sampled)).to(losses.dtype)
        losses += values * weights
        if number:
            by_logits.addcmul_(gradient, weights[:, None])
        else:
            torch.mul(gradient, weights[:, None], out=by_logits)
    others = {name: term for name, term in terms.items() if term.divergence is None}
    if others:
        exact_kl = lambda target: compare(target, REVERSE_KL, 0.0)[0]  # noqa: E731
        chunk = Chunk(tokens, plan, sampled.clone(), exact_kl=exact_kl, exact_mean=mean)
        of_others, by_sampled, _ = sum_of_terms(others, chunk)
        losses = losses + of_others
        if mass is not None:
            p.mul_(mass)
        logits.addcmul_(probabilities, -by_sampled).scatter_add_(-1, tokens.target_ids[:, None], by_sampled)
    return losses, sampled[:, 0], entropy


def _candidates(needs: Needs, logits: Tensor, tokens: CompletionTokens) -> tuple[Tensor, Tensor | None]:
    """Return the candidates and which of them take part, None being all.

    A teacher whose vocabulary is padded may choose a token that the student does not have: it takes no part. Nor does
    one of the student's that is no token of a teacher with another tokenizer.
    """
    if needs.candidates_from != "teacher":
        return tokens.candidate_ids, tokens.shared
    inside = tokens.candidate_ids < logits.shape[-1]
    candidates = tokens.candidate_ids.clamp(max=logits.shape[-1] - 1)
    if needs.intersection:
        inside &= logits.gather(-1, candidates) >= kth_largest(logits, needs.num_candidates)[:, None]
    return candidates, inside


def _mass(candidates: Tensor, probabilities: Tensor, sampled_candidates: bool) -> Tensor:
    """Return the student's probability of the distinct candidates; independent draws may repeat."""
    if not sampled_candidates:
        return probabilities.sum(-1)
    in_order, order = candidates.sort(dim=-1)
    is_new = torch.ones_like(in_order, dtype=torch.bool)
    is_new[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
    return (probabilities.gather(-1, order) * is_new).sum(-1)
