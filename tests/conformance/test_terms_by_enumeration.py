"""What terms beyond the presets expect, by exact enumeration in float64 of every token that may be written.

One prefix; each expected gradient is written down as the formula of its source, and differentiated by autograd.
"""

import itertools
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from cluster.config.objective import ObjectiveConfig
from cluster.config.terms import DivergenceTerm
from learner.loss.divergences import DIVERGENCES
from learner.loss.objective import Objective
from learner.loss.terms import DivergenceLoss
from tests.learner.loss.builders import evaluate, first_pass, gradient_of, make_objective, make_tokens, random_logprobs

VOCABULARY, SUPPORT_SIZE = 11, 4
STUDENT, TEACHER, BASE = (random_logprobs(1, VOCABULARY, seed=seed, scale=1.5) for seed in (0, 1, 2))
OTHER = random_logprobs(1, VOCABULARY, seed=3)
STALE = (STUDENT + random_logprobs(1, VOCABULARY, seed=4, scale=0.6)).log_softmax(-1)
ROLLOUTS = {"on-policy": STUDENT, "stale": STALE}
OF_ANY_AGE = pytest.mark.parametrize("rollout", ROLLOUTS.values(), ids=ROLLOUTS)


def expected_gradient(
    terms: dict[str, Any],
    rollout: Tensor = STUDENT,
    support: str = "sampled",
    student: Tensor = STUDENT,
    temperature: float = 1.0,
    **columns: Any,
) -> Tensor:
    """Return the mean gradient by the logits over what the rollout worker may write, [vocabulary]."""
    sized = {} if support in ("sampled", "full") else {"support_size": SUPPORT_SIZE}
    objective = make_objective(support=support, terms=terms, temperature=temperature, **sized)
    models = {"teacher": TEACHER.expand(VOCABULARY, -1), "base": BASE.expand(VOCABULARY, -1)}
    chooser = rollout if objective.needs.candidates_from == "student" else TEACHER
    candidates = chooser.topk(objective.needs.num_candidates).indices.expand(VOCABULARY, -1)
    tokens = make_tokens(
        torch.arange(VOCABULARY),
        models,
        rollout.expand(VOCABULARY, -1),
        candidates,
        student_chose=objective.needs.candidates_from == "student",
        lengths=[1] * VOCABULARY,
        **columns,
    )
    by_token = gradient_of(evaluate(objective, student.expand(VOCABULARY, -1), tokens, models))
    return rollout.exp()[0] @ by_token


def slope(loss: Callable[[Tensor], Tensor], student: Tensor = STUDENT) -> Tensor:
    """Return the gradient by the logits of a function of the student's log-probabilities, [vocabulary]."""
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf.log_softmax(-1)).sum(), leaf)[0][0]


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("support", ["sampled", "full", "topk"])
def test_cross_entropy_pulls_the_student_to_whatever_wrote(support: str) -> None:
    found = expected_gradient({"main": {"loss": "cross_entropy"}}, OTHER, support)
    assert_same(found, slope(lambda p: (OTHER.exp() * (OTHER - p)).sum(-1)))


def test_a_gate_takes_the_weight_from_tokens_that_the_student_would_never_write() -> None:
    """Sigmoid(kappa (log p - gamma)), without a gradient of its own."""
    gate = {"kappa": 3.0, "gamma": -2.0}
    weight = 1 / (1 + (-3 * (STUDENT + 2)).exp())
    found = expected_gradient({"main": {"loss": "cross_entropy", "gate": gate}}, OTHER)
    assert_same(found, slope(lambda p: -(OTHER.exp() * weight * p).sum(-1)))


def test_cross_entropy_on_the_student_s_own_tokens_says_nothing_unless_some_are_chosen() -> None:
    assert expected_gradient({"main": {"loss": "cross_entropy"}}).norm() < 1e-15
    chosen = {"loss": "cross_entropy", "when": "log_ratio_positive"}
    better = (TEACHER > STUDENT).double()
    assert_same(expected_gradient({"main": chosen}), slope(lambda p: -(STUDENT.exp() * better * p).sum(-1)))


BETTER = TEACHER > STUDENT
REWARD = torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64)  # that of a completion that begins with the token
CHOSEN = {
    "log_ratio_positive": BETTER,
    "reward_positive": REWARD > 0,
    "advantage_positive": REWARD > 0.5,
    "outcome_agrees": (REWARD > 0.5) == BETTER,
    "models_agree": (BASE > STUDENT) == BETTER,
}


@OF_ANY_AGE
@pytest.mark.parametrize("when", CHOSEN)
def test_a_condition_and_its_contrary_split_the_tokens(when: str, rollout: Tensor) -> None:
    contrary = {"outcome_agrees": "outcome_disagrees", "models_agree": "models_disagree"}
    target = {"teacher": 1.0, "base": 0.0} if when == "models_agree" else {"teacher": 1.0}
    term = {"loss": "policy_gradient", "target": target}
    columns = {"reward": REWARD, "task_advantage": REWARD - 0.5}

    def expected(chosen: Tensor) -> Tensor:
        return slope(lambda p: (STUDENT.exp() * chosen * (STUDENT - TEACHER) * p).sum(-1))

    chosen = CHOSEN[when].reshape(1, -1)
    assert 1 < chosen.sum() < VOCABULARY - 1
    assert_same(expected_gradient({"main": {**term, "when": when}}, rollout, **columns), expected(chosen.double()))
    otherwise = contrary.get(when, when.replace("positive", "not_positive"))
    found = expected_gradient({"main": {**term, "when": otherwise}}, rollout, **columns)
    assert_same(found, expected(1 - chosen.double()))


def test_a_text_without_a_reward_is_not_positive_and_one_that_is_as_good_as_the_others_neither() -> None:
    nothing = torch.full((VOCABULARY,), torch.nan, dtype=torch.float64)
    level = torch.zeros(VOCABULARY, dtype=torch.float64)
    term = {"loss": "policy_gradient"}
    everything = expected_gradient({"main": term})
    for when in ("reward_not_positive", "advantage_not_positive", "outcome_disagrees"):
        found = expected_gradient({"main": {**term, "when": when}}, reward=nothing, task_advantage=level)
        assert_same(found, everything)


@OF_ANY_AGE
@pytest.mark.parametrize("support", ["topk", "student_topk", "intersection", "full"])
@pytest.mark.parametrize(
    ("fields", "phi"),
    [
        ({"log_ratio_map": "power"}, TEACHER.exp() - STUDENT.exp()),
        ({"log_ratio_map": "clip", "bound": 0.5}, (TEACHER - STUDENT).clamp(-0.5, 0.5)),
        ({"target": {"teacher": 1.0, "base": -1.0}, "student": "none"}, TEACHER - BASE),
    ],
    ids=["power", "clip", "delta"],
)
def test_the_mean_over_the_support_changes_nothing_in_expectation(
    support: str, fields: dict[str, Any], phi: Tensor, rollout: Tensor
) -> None:
    term = {"loss": "policy_gradient", "baseline": "support_mean", **fields}
    found = expected_gradient({"main": term}, rollout, support)
    assert_same(found, slope(lambda p: -(STUDENT.exp() * phi * p).sum(-1)))


@pytest.mark.parametrize("support", ["full", "topk", "intersection"])
def test_the_residual_advantage_is_that_of_the_paper(support: str) -> None:
    """A(y) = d(y) - sum of p d, d = q - p (arXiv 2610.11519): over the vocabulary, or over what a support compares."""
    d, every = TEACHER.exp() - STUDENT.exp(), torch.arange(VOCABULARY)
    listed, of_student = (values[0].topk(SUPPORT_SIZE).indices for values in (TEACHER, STUDENT))
    counted = {"full": every, "topk": listed, "intersection": listed[torch.isin(listed, of_student)]}[support]
    assert 0 < len(counted) < SUPPORT_SIZE or support != "intersection"
    models = {"teacher": TEACHER.expand(VOCABULARY, -1)}
    term = {"loss": "policy_gradient", "log_ratio_map": "power", "baseline": "support_mean"}
    objective = make_objective(support=support, terms={"main": term}, support_size=SUPPORT_SIZE)
    candidates = None if support == "full" else listed.expand(VOCABULARY, -1)
    tokens = make_tokens(every, models, STUDENT.expand(VOCABULARY, -1), candidates)
    losses = evaluate(objective, STUDENT.expand(VOCABULARY, -1), tokens, models).losses
    torch.testing.assert_close(losses, -(d - (STUDENT.exp() * d)[:, counted].sum())[0])


@OF_ANY_AGE
def test_a_constant_advantage_pushes_down_what_is_chosen_and_else_nothing(rollout: Tensor) -> None:
    term = {"loss": "policy_gradient", "log_ratio_map": "constant", "alpha": 0.5}
    assert expected_gradient({"main": term}, rollout).norm() < 1e-15
    found = expected_gradient({"main": {**term, "when": "log_ratio_not_positive"}}, rollout)
    assert_same(found, slope(lambda p: 0.5 * (STUDENT.exp() * ~BETTER * p).sum(-1)))


TAU = 0.02
ENTRIES: dict[str, tuple[dict[str, float], Callable[[Tensor, Tensor], Tensor]]] = {  # of student and teacher
    "reverse_kl": ({}, lambda p, q: p.exp() * (p - q)),
    "forward_kl": ({}, lambda p, q: q.exp() * (q - p)),
    "jsd": (
        {"beta": 0.5},
        lambda p, q: (q.exp() * (q - log_mean(p, q)) + p.exp() * (p - log_mean(p, q))) / 2,
    ),
    "jsd as forward_kl": ({"beta": 0.0}, lambda p, q: q.exp() * (q - p)),
    "skewed_reverse_kl": ({"skew": 0.5}, lambda p, q: p.exp() * (p - log_mean(p, q))),
    "skewed_forward_kl": ({"skew": 0.5}, lambda p, q: q.exp() * (q - log_mean(p, q))),
}


def log_mean(p: Tensor, q: Tensor) -> Tensor:
    return ((p.exp() + q.exp()) / 2).log()


@pytest.mark.parametrize("name", ENTRIES)
def test_no_token_of_the_vocabulary_contributes_more_than_the_clip(name: str) -> None:
    """OPSD's sum of min(entry, tau), as its code has it, differentiated by autograd."""
    fields, entries = ENTRIES[name]
    term = {"loss": "divergence", "divergence": name.split()[0], "entry_clip": TAU, **fields}
    cut = entries(STUDENT, TEACHER) > TAU
    assert 0 < cut.sum() < VOCABULARY
    found = expected_gradient({"main": term}, support="full")
    assert_same(found, slope(lambda p: entries(p, TEACHER).clamp(max=TAU).sum(-1)))
    objective = make_objective(support="full", terms={"main": term})
    models = {"teacher": TEACHER}
    results = evaluate(objective, STUDENT, make_tokens(torch.tensor([0]), models), models)
    assert results.losses.item() == pytest.approx(entries(STUDENT, TEACHER).clamp(max=TAU).sum().item())


@pytest.mark.parametrize("truncation", ["tail", "generalized", "renormalized"])
def test_no_candidate_and_no_tail_contributes_more_than_the_clip(truncation: str) -> None:
    """Of the form that is at least 0: p log(p / q) - p + q, over the teacher's candidates and the bucket."""
    listed = TEACHER[0].topk(SUPPORT_SIZE).indices

    def buckets(logprobs: Tensor) -> Tensor:
        kept = logprobs[:, listed]
        if truncation == "renormalized":
            return kept.log_softmax(-1)
        rest = (1 - kept.exp().sum(-1, keepdim=True)).log()
        return torch.cat([kept, rest], -1) if truncation == "tail" else kept

    def entries(p: Tensor) -> Tensor:
        ours, theirs = buckets(p), buckets(TEACHER)
        return ours.exp() * (ours - theirs) - ours.exp() + theirs.exp()

    cut = entries(STUDENT) > TAU
    assert 0 < cut.sum() < cut.numel()
    term = {"loss": "divergence", "entry_clip": TAU, "truncation": truncation}
    assert_same(expected_gradient({"main": term}, support="topk"), slope(lambda p: entries(p).clamp(max=TAU).sum(-1)))


@pytest.mark.parametrize("support", ["full", "topk"])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_a_clip_leaves_a_student_alone_that_equals_its_teacher(name: str, support: str) -> None:
    term = {"loss": "divergence", "divergence": name, "entry_clip": 1e-3}
    assert expected_gradient({"main": term}, support=support, student=TEACHER).abs().max() < 1e-15


def test_a_clipped_divergence_has_no_kernel_and_every_other_keeps_its_own() -> None:
    for name in ("reverse_kl", "jsd"):
        for clip, kernel in ((None, DIVERGENCES[name].kernel), (TAU, None)):
            term = DivergenceLoss("main", DivergenceTerm(divergence=name, beta=1.0, entry_clip=clip), 1.0)
            divergence, parameter = term.divergence
            assert divergence.at(parameter).kernel == (kernel and "reverse_kl")


@OF_ANY_AGE
def test_the_mean_of_a_step_of_two_tokens_leaves_half_of_the_gradient(rollout: Tensor) -> None:
    """A token's own advantage is half of the mean, and the other's is a baseline: of N tokens, 1 - 1/N is left."""
    config = msgspec.convert(
        {"support": "sampled", "terms": {"main": {"loss": "policy_gradient", "baseline": "batch_mean"}}},
        ObjectiveConfig,
    )
    every, models = torch.arange(VOCABULARY), {"teacher": TEACHER.expand(VOCABULARY, -1)}
    logits = STUDENT.expand(VOCABULARY, -1)
    tokens = make_tokens(every, models, rollout.expand(VOCABULARY, -1), lengths=[1] * VOCABULARY)
    of_mean = [gradient_of(evaluate(Objective(config, step_means={"main": m}), logits, tokens)) for m in (0.0, 1.0)]
    without, by_mean = of_mean[0], of_mean[1] - of_mean[0]  # the gradient is a straight line in the mean
    advantage, written = (TEACHER - STUDENT)[0], rollout.exp()[0]
    found = torch.zeros(VOCABULARY, dtype=torch.float64)
    for first, second in itertools.product(range(VOCABULARY), repeat=2):
        mean = (advantage[first] + advantage[second]) / 2
        both = without[first] + without[second] + mean * (by_mean[first] + by_mean[second])
        found += written[first] * written[second] * both / 2
    assert_same(found, slope(lambda p: (p.exp() * (p - TEACHER)).sum(-1)) / 2)
    with pytest.raises(ValueError, match="pass step_means"):
        Objective(config).plan(tokens, None)


def test_the_mean_of_a_step_is_that_of_its_tokens_by_weight() -> None:
    config = msgspec.convert(
        {
            "support": "sampled",
            "terms": {"main": {"loss": "policy_gradient", "baseline": "batch_mean", "log_ratio_map": "power"}},
            "token_weights": {"skip_first": 1},
        },
        ObjectiveConfig,
    )
    models = {"teacher": TEACHER.expand(VOCABULARY, -1)}
    weight = torch.tensor([1.0] * 5 + [2.0] * 6, dtype=torch.float64)
    tokens = make_tokens(torch.arange(VOCABULARY), models, lengths=[5, 6], weight=weight)
    read = first_pass(STUDENT.expand(VOCABULARY, -1), tokens)
    (mean,) = Objective(config).advantage_sums(tokens, read).values()
    counted = weight * torch.tensor([0.0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1])
    expected = (counted * (TEACHER.exp() - STUDENT.exp())[0]).sum() / counted.sum()
    assert mean.value == pytest.approx(expected.item())


def test_the_mean_of_a_response_is_taken_off_the_advantages_of_its_tokens_alone() -> None:
    """Of two responses of 5 and 6 tokens whose first ones do not count; each has its own mean, by weight."""
    objective = make_objective(
        support="sampled",
        terms={"main": {"loss": "policy_gradient", "baseline": "response_mean", "importance": {"kind": "none"}}},
        token_weights={"skip_first": 1},
    )
    assert objective.needs.first_pass
    assert not objective.needs.step_means
    models = {"teacher": TEACHER.expand(VOCABULARY, -1)}
    logits = STUDENT.expand(VOCABULARY, -1)
    tokens = make_tokens(torch.arange(VOCABULARY), models, logits, lengths=[5, 6])
    advantage = (TEACHER - STUDENT)[0]
    centred = torch.cat([advantage[:5] - advantage[1:5].mean(), advantage[5:] - advantage[6:].mean()])
    counted = torch.tensor([0.0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1], dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    log_p = leaf.log_softmax(-1).diagonal()
    (expected,) = torch.autograd.grad(-(counted * centred * log_p).sum(), leaf)
    assert_same(gradient_of(evaluate(objective, logits, tokens)), expected)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize(
    ("support", "fields"),
    [
        ("sampled", {"when": "outcome_agrees"}),
        ("sampled", {"when": "models_disagree", "target": {"teacher": 1.0, "base": 0.0}}),
        ("sampled", {"log_ratio_map": "constant", "when": "log_ratio_not_positive"}),
        ("topk", {"log_ratio_map": "power", "baseline": "support_mean"}),
        ("full", {"baseline": "support_mean"}),
    ],
)
def test_the_sampling_temperature_changes_what_is_seen_and_not_what_is_expected(
    support: str, fields: dict[str, Any], temperature: float
) -> None:
    terms = {"main": {"loss": "policy_gradient", **fields}}
    columns = {"reward": REWARD, "task_advantage": REWARD - 0.5}
    stale = (STUDENT / temperature + random_logprobs(1, VOCABULARY, seed=5, scale=0.4)).log_softmax(-1)
    found = expected_gradient(terms, stale, support, temperature=temperature, **columns)
    assert_same(found, expected_gradient(terms, STUDENT, support, **columns))
