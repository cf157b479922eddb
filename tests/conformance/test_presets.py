"""Every preset's expected gradient is its source's formula, by enumeration in float64.

All completions of two tokens, weighed by the probability that the student of some steps ago writes them at a sampling
temperature. The formulas are those of the papers in `docs/objective.md`, at temperature 1 whatever the sampler's. The
probabilities lie on both sides of every bound that a preset has.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from cluster.config.presets import PRESETS
from tests.learner.loss.builders import evaluate, gradient_of, make_tokens, random_logprobs, small

RATIOS = torch.tensor([0.45, 0.55, 0.78, 0.83, 1.17, 1.23, 2.9, 3.1, 4.5, 5.5, 0.0, 0.9], dtype=torch.float64)
SHARES = torch.tensor([0.05, 0.06, 0.1, 0.12, 0.11, 0.09, 0.08, 0.07, 0.001, 0.0008, 0.2, 0.1192], dtype=torch.float64)
LEANINGS = torch.tensor([-1.0, 0.7, -1.0, -0.9, 1.0, 1.1, -2.8, -2.9, 5.7, 4.7, -0.2, -5.6], dtype=torch.float64)
VOCABULARY, STATES, K = len(SHARES), 1 + len(SHARES), 5
SIZES = {"async-opd": 2, "rethinking": 10}  # of supports, where not K: two draws, and tokens beyond the dual clip
STEPS = {"last-opd": 4}  # of a schedule, where not its first: latent 1 -> 0 and tokens 0 -> 1 over ten steps
WIDTH, DEPTH = 6, 3  # of hidden states


@dataclass(frozen=True)
class Case:
    """Holds distributions of the first token and, for each first token, of the second: [1 + vocabulary, vocabulary]."""

    temperature: float
    student: Tensor  # log p
    at_sampling: Tensor  # log p at the sampling temperature
    rollout: Tensor  # log µ at the sampling temperature
    rollout_at_1: Tensor  # the same at temperature 1, with the normaliser of p
    teacher: Tensor
    base: Tensor
    initial: Tensor
    reward: Tensor  # [vocabulary, vocabulary] of a completion

    @property
    def models(self) -> Mapping[str, Tensor]:
        return {"teacher": self.teacher, "base": self.base, "initial_student": self.initial}


@cache
def make_case(temperature: float, is_stale: bool) -> Case:
    """Let ratio, log-ratio and teacher entropy lie closely around the presets' bounds, in the first state above all."""
    first = SHARES.log().repeat(STATES, 1)
    first[1:] += random_logprobs(VOCABULARY, VOCABULARY, seed=0, scale=0.5)
    at_sampling = first.log_softmax(-1)
    student = (at_sampling * temperature).log_softmax(-1)
    rollout = at_sampling
    if is_stale:
        ratios = RATIOS.clone()
        known = RATIOS > 0  # the one that is 0 makes the sum 1
        ratios[~known] = SHARES[~known] / (1 - (SHARES[known] / RATIOS[known]).sum())
        rollout = (at_sampling - ratios.log()).log_softmax(-1)
    teacher = (student + LEANINGS).log_softmax(-1)
    entropies = torch.linspace(0.62, 1.5, VOCABULARY, dtype=torch.float64)
    teacher[1:] = with_entropies(random_logprobs(VOCABULARY, VOCABULARY, seed=4, scale=1.0), entropies)
    normaliser = student[:, :1] / temperature - at_sampling[:, :1]
    base, initial = (random_logprobs(STATES, VOCABULARY, seed=seed, scale=1.0) for seed in (1, 2))
    rollout_at_1 = temperature * (rollout + normaliser)
    reward = torch.randn(VOCABULARY, VOCABULARY, generator=torch.manual_seed(3), dtype=torch.float64)
    return Case(temperature, student, at_sampling, rollout, rollout_at_1, teacher, base, initial, reward)


def with_entropies(logprobs: Tensor, entropies: Tensor) -> Tensor:
    """Sharpen or flatten each distribution until it has its entropy, in nats."""
    low, high = torch.full_like(entropies, 0.01), torch.full_like(entropies, 20.0)
    for _ in range(60):
        middle = (low + high) / 2
        made = (logprobs * middle[:, None]).log_softmax(-1)
        is_flat = -(made.exp() * made).sum(-1) > entropies
        low, high = torch.where(is_flat, middle, low), torch.where(is_flat, high, middle)
    return made


# Formulas: each returns the expected gradient by the logits at each state, [states, vocabulary].

Rule = Callable[[Tensor, Tensor], Tensor]  # ratio, advantage -> what the gradient of log p is multiplied by, but for -A


def slope(case: Case, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Differentiate a function of the student's log-probabilities, [states, vocabulary] -> [states]."""
    logits = case.student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits.log_softmax(-1)).sum(), logits)
    return gradient


def drawn(case: Case, weights: Tensor) -> Tensor:
    """Return the gradient of the sum of weights times log p."""
    return weights - case.student.exp() * weights.sum(-1, keepdim=True)


def policy_gradient(case: Case, advantage: Tensor, rule: Rule = lambda ratio, _: ratio) -> Tensor:
    """Sum over the tokens that the older student writes; the weight p / p_T takes the temperature out again."""
    ratio = (case.at_sampling - case.rollout).exp()
    to_1 = (case.student - case.at_sampling).exp()
    return drawn(case, -case.rollout.exp() * to_1 * rule(ratio, advantage) * advantage)


def ppo(ratio: Tensor, advantage: Tensor) -> Tensor:
    """Schulman et al. 2017: no gradient beyond 1.2 where the advantage is good, and below 0.8 where it is bad."""
    return ratio.masked_fill(((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8)), 0.0)


def dual_clip(ratio: Tensor, advantage: Tensor) -> Tensor:
    """Ye et al. 2020: and none above 3 where it is bad."""
    return ppo(ratio, advantage).masked_fill((advantage < 0) & (ratio > 3), 0.0)


def icepop(ratio: Tensor, _advantage: Tensor) -> Tensor:
    return ratio.masked_fill((ratio < 0.5) | (ratio > 5), 0.0)


def kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(-1)


def mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    return (share * first.exp() + (1 - share) * second.exp()).log()


def jsd(p: Tensor, q: Tensor) -> Tensor:
    middle = mixture(p, q, 0.5)
    return (kl(p, middle) + kl(q, middle)) / 2


def top(logprobs: Tensor, size: int = K) -> Tensor:
    return logprobs.topk(size).indices


def gathered(logprobs: Tensor, ids: Tensor) -> Tensor:
    return logprobs.gather(-1, ids)


def with_rest(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Return the probabilities of some tokens and that of all others, as logarithms."""
    listed = gathered(logprobs, ids)
    return torch.cat([listed, (1 - listed.exp().sum(-1, keepdim=True)).log()], dim=-1)


def generalized(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second) - first.exp() + second.exp()).sum(-1)


def log_ratio(case: Case) -> Tensor:
    return case.teacher - case.student


def reverse_kl(case: Case) -> Tensor:
    return slope(case, lambda p: kl(p, case.teacher))


def forward_kl_on_top_k(case: Case) -> Tensor:
    ids = top(case.teacher)
    return slope(case, lambda p: generalized(gathered(case.teacher, ids), gathered(p, ids)))


def on_the_students(case: Case) -> Tensor:
    """Of the tokens that the student listed, renormalised on both sides, the reverse KL."""
    ids = top(case.rollout)
    teacher = gathered(case.teacher, ids).log_softmax(-1)
    return slope(case, lambda p: kl(gathered(p, ids).log_softmax(-1), teacher))


def many_faces(case: Case) -> Tensor:
    """Of the teacher's top-k those that are in the student's too, renormalised on both sides."""
    of_both = [
        torch.tensor(sorted(set(ours.tolist()) & set(theirs.tolist())), dtype=torch.long)
        for ours, theirs in zip(top(case.student), top(case.teacher), strict=True)
    ]
    assert any(0 < len(ids) < K for ids in of_both)

    def loss(p: Tensor) -> Tensor:
        rows = zip(p, case.teacher, of_both, strict=True)
        return torch.stack([kl(*(side[ids].log_softmax(-1) for side in (p, q))) for p, q, ids in rows])

    return slope(case, loss)


def rethinking(case: Case) -> Tensor:
    """thunlp/OPD: softmax over the top-k of the old student's log-probabilities, times log q - log p_old, in PPO."""
    ids, advantage = top(case.rollout, SIZES["rethinking"]), case.teacher - case.rollout_at_1
    ratio = (case.at_sampling - case.rollout).exp()
    weights = case.rollout.exp() * (case.student - case.at_sampling).exp()
    inside = torch.zeros_like(weights).scatter_(-1, ids, 1.0)
    normalised = weights / (case.rollout_at_1.exp() * inside).sum(-1, keepdim=True)
    return drawn(case, -inside * normalised * dual_clip(ratio, advantage) * advantage)


def direct_opd(case: Case) -> Tensor:
    """Teacher over base times initial student, normalised over the student's top-k and the rest."""
    ids = top(case.rollout)
    q, base, initial, p = (with_rest(x, ids) for x in (case.teacher, case.base, case.initial, case.student))
    advantage = ((q - base + initial).log_softmax(-1) - p)[:, :K]
    return drawn(case, torch.zeros_like(case.student).scatter(-1, ids, -p[:, :K].exp() * advantage))


def eopd(case: Case) -> Tensor:
    entropy = -(case.teacher.exp() * case.teacher).sum(-1, keepdim=True)  # 0.78 in one state, 0.86 in the next
    return reverse_kl(case) + (entropy > 0.8) * forward_kl_on_top_k(case)


def routed(case: Case, chosen: Tensor) -> Tensor:
    """Return sampled tokens with a policy gradient as far as they are chosen, and the forward KL for the others."""
    others = (case.rollout.exp() * (1 - chosen)).sum(-1, keepdim=True)
    return policy_gradient(case, log_ratio(case) * chosen) + others * forward_kl_on_top_k(case)


def to_target(case: Case, teacher: float, base: float, initial: float) -> Tensor:
    target = (teacher * case.teacher + base * case.base + initial * case.initial).log_softmax(-1)
    return slope(case, lambda p: kl(p, target))


AT_EACH_STATE: dict[str, Callable[[Case], Tensor]] = {
    "thinking-machines": reverse_kl,
    "thinking-machines-frozen": lambda c: policy_gradient(c, c.teacher - c.rollout_at_1),
    "ppo-k1": lambda c: policy_gradient(c, c.teacher - c.rollout_at_1, ppo),
    "clipped": lambda c: policy_gradient(c, log_ratio(c).clamp(-5, 5)),
    "soft-log": lambda c: policy_gradient(c, log_ratio(c).sign() * (1 + log_ratio(c).abs()).log()),
    "power-opd": lambda c: policy_gradient(c, c.teacher.exp() - c.student.exp()),
    "top-d": lambda c: policy_gradient(c, (0.1 * log_ratio(c).exp() + 0.9).log()),
    "opd-plus-forward-kl": lambda c: slope(c, lambda p: kl(c.teacher, p)),
    "opd-plus-jsd": lambda c: slope(c, lambda p: jsd(p, c.teacher)),
    "icepop": lambda c: policy_gradient(c, log_ratio(c), icepop),
    "mopd": lambda c: policy_gradient(c, log_ratio(c).clamp(-5, 5), icepop),
    "gkd": lambda c: slope(c, lambda p: jsd(p, c.teacher)),
    "exact-reverse-kl": reverse_kl,
    "exact-forward-kl": lambda c: slope(c, lambda p: kl(c.teacher, p)),
    "distillm": lambda c: slope(c, lambda p: kl(c.teacher, mixture(c.teacher, p, 0.1))),
    "generalized-topk": lambda c: slope(
        c, lambda p: generalized(gathered(p, top(c.teacher)), gathered(c.teacher, top(c.teacher)))
    ),
    "tail-topk": reverse_kl,
    "res-opd": reverse_kl,
    # At the prefixes of whichever student wrote them, which `visits` counts; no ratio, for no sampled token counts.
    "semi-opd": lambda c: slope(c, lambda p: kl(with_rest(p, top(c.teacher)), with_rest(c.teacher, top(c.teacher)))),
    "tt-opd": reverse_kl,
    "many-faces": many_faces,
    "cross-tokenizer": on_the_students,
    "sdpo": lambda c: slope(c, lambda p: jsd(with_rest(p, top(c.rollout)), with_rest(c.teacher, top(c.rollout)))),
    # Their alpha of 1, which is the reverse KL; the 2 that their code clips ratios at is not part of it.
    "sdpo-feedback": lambda c: slope(
        c, lambda p: kl(with_rest(p, top(c.rollout)), with_rest(c.teacher, top(c.rollout)))
    ),
    "last-opd": lambda c: 0.4 * reverse_kl(c),
    "rethinking": rethinking,
    "async-opd": reverse_kl,
    "vopd": reverse_kl,
    "eopd": eopd,
    "aopd": lambda c: routed(c, (log_ratio(c) > 0).double()),
    "tropd": lambda c: routed(c, log_ratio(c).exp().clamp(max=1.0)),
    "exopd": lambda c: to_target(c, 1.25, 0.0, -0.25),
    "direct-opd": direct_opd,
    "delta-opd": lambda c: policy_gradient(c, c.teacher - c.base),
    "beta-opsd": lambda c: to_target(c, 0.5, 0.0, 0.5),
}


def of_completions(case: Case, target: Tensor, advantages: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Make of the log-ratios of both tokens, each [first, second], advantages; only a token's own ratio counts."""
    d, ratio = target - case.student, (case.student - case.rollout).exp()
    first, second = advantages(d[0][:, None].expand(VOCABULARY, VOCABULARY), d[1:])
    written = case.rollout[0].exp()[:, None] * case.rollout[1:].exp()
    at_first = (written * ratio[0][:, None] * first).sum(-1, keepdim=True)
    return drawn(case, -torch.cat([at_first.T, written * ratio[1:] * second]))


def iw_opd(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """w = 1 + 0.5 (1 - share of |A| that is seen before)."""
    seen = first.abs() / (first.abs() + second.abs())
    return 1.5 * first, (1.5 - 0.5 * seen) * second


OF_COMPLETIONS: dict[str, Callable[[Case], Tensor]] = {
    "minillm": lambda c: of_completions(c, c.teacher, lambda first, second: (first + second, second)),
    "iw-opd": lambda c: of_completions(c, c.teacher, iw_opd),
    "opd-grpo": lambda c: of_completions(c, c.teacher, lambda first, second: (first + c.reward, second + c.reward)),
    "beta-opsd-returns": lambda c: of_completions(
        c, (c.teacher + c.initial) / 2, lambda first, second: (first + 0.99 * second, second)
    ),
}


# Of the student's hidden states and the teacher's, each [states, layers, width], by which the gradient is.
OF_STATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # (1 / layers) (1 / width) |h - h_T|^2 at each token's predicting row.
    "oprd": lambda student, teacher: 2 * (student - teacher) / (DEPTH * WIDTH),
    "last-opd": lambda student, teacher: 0.6 * 2 * (student - teacher) / WIDTH,
}


def visits(case: Case) -> Tensor:
    """Return how often the older student comes to each state, [states]."""
    return torch.cat([torch.ones(1, dtype=torch.float64), case.rollout[0].exp()])


def expected_gradient(name: str, case: Case) -> Tensor:
    if name in OF_COMPLETIONS:
        return OF_COMPLETIONS[name](case)
    return visits(case)[:, None] * AT_EACH_STATE[name](case)


def found_gradient(name: str, case: Case) -> Tensor:
    """Evaluate the preset on every completion, and on every further draw where the support has draws."""
    size = SIZES.get(name, K)
    objective = small(name, case.temperature, size, STEPS.get(name, 0))
    completions = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=2)))
    n = len(completions)
    ids, rows = completions.flatten(), torch.stack([torch.zeros(n).long(), completions[:, 0] + 1], dim=-1).flatten()
    weights = torch.repeat_interleave(case.rollout[rows, ids].reshape(n, 2).sum(-1).exp(), 2)
    reward, lengths, candidates = torch.repeat_interleave(case.reward.flatten(), 2), [2] * n, None
    if objective.needs.sampled_candidates:  # each token with each further draw, which needs no whole completion
        weights = (weights[:, None] * case.rollout[rows].exp()).flatten()
        rows, ids = torch.repeat_interleave(rows, VOCABULARY), torch.repeat_interleave(ids, VOCABULARY)
        candidates, reward, lengths = torch.arange(VOCABULARY).repeat(2 * n)[:, None], rows.double(), [1] * len(rows)
    elif objective.needs.num_candidates:
        candidates = top(case.rollout if objective.needs.candidates_from == "student" else case.teacher, size)[rows]
    models = {name: values[rows] for name, values in case.models.items()}
    student_chose = objective.needs.candidates_from == "student"
    tokens = make_tokens(ids, models, case.rollout[rows], candidates, student_chose, lengths, task_advantage=reward)
    # A token is trusted with the probability q / p: at 0 always, and at nearly 1 where that is 1 or more.
    chance = (case.teacher - case.student)[rows, ids].clamp(max=0.0).exp()
    thresholds = ((0.0, chance), (1 - 1e-15, 1 - chance)) if name == "tropd" else ((0.5, torch.ones_like(chance)),)
    gradient = torch.zeros_like(case.student[rows])
    for uniform, share in thresholds:
        at_threshold = replace(tokens, uniform=torch.full_like(weights, uniform))
        gradient += gradient_of(evaluate(objective, case.student[rows], at_threshold, models)) * share[:, None]
    return torch.zeros_like(case.student).index_add_(0, rows, gradient * weights[:, None])


def test_every_preset_has_its_formula() -> None:
    assert {*AT_EACH_STATE, *OF_COMPLETIONS, *OF_STATES} == set(PRESETS)


@pytest.mark.parametrize("name", [*AT_EACH_STATE, *OF_COMPLETIONS])
@pytest.mark.parametrize("is_stale", [False, True], ids=["on-policy", "stale"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_expected_gradient_is_that_of_the_source(name: str, is_stale: bool, temperature: float) -> None:
    case = make_case(temperature, is_stale)
    expected = expected_gradient(name, case)
    assert expected.norm() > 1e-2
    torch.testing.assert_close(found_gradient(name, case), expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", OF_STATES)
@pytest.mark.parametrize("is_stale", [False, True], ids=["on-policy", "stale"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_expected_gradient_by_hidden_states_is_that_of_the_source(
    name: str, is_stale: bool, temperature: float
) -> None:
    """Of a state, all tokens that the older student writes there have the same gradient."""
    case, objective = make_case(temperature, is_stale), small(name, temperature, step=STEPS.get(name, 0))
    layers = objective.student_layers(DEPTH)
    student, teacher = (
        torch.randn(STATES, len(layers), WIDTH, generator=torch.manual_seed(seed), dtype=torch.float64)
        for seed in (5, 6)
    )
    rows, ids = torch.arange(STATES).repeat_interleave(VOCABULARY), torch.arange(VOCABULARY).repeat(STATES)
    models = {model: values[rows] for model, values in case.models.items()}
    tokens = make_tokens(ids, models, case.rollout[rows], lengths=[1] * len(ids))
    states = {layer: student[rows, place] for place, layer in enumerate(layers)}
    sent = {"teacher": {"hidden": teacher[rows, -1], "layers": teacher[rows].flatten(1)}}
    said = case.student[rows, ids]
    _, _, gradients = objective.align(states, sent, tokens, objective.plan(tokens, None), said, DEPTH)
    weights = visits(case)[rows] * case.rollout[rows, ids].exp()
    found = torch.zeros_like(student)
    for place, layer in enumerate(layers):
        found[:, place].index_add_(0, rows, gradients[layer] * weights[:, None])
    expected = visits(case)[:, None, None] * OF_STATES[name](student, teacher)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)
