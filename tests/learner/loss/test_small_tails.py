"""A student whose own tail is below what its candidates' log-probabilities can say of it is pulled back."""

import pytest
import torch
from torch import Tensor

from learner.loss.divergences import SMALLEST_TAIL
from tests.learner.loss.builders import BUCKET_DIVERGENCES, evaluate, gradient_of, make_objective, make_tokens

VOCABULARY, K = 12, 3
TAIL = 1e-9  # of the student
PARAMETERS = {"jsd": 0.3, "skewed_forward_kl": 0.2, "skewed_reverse_kl": 0.2}


def with_tail_of(tail: float, seed: int) -> Tensor:
    """Return random log-probabilities [1, vocabulary] whose first k tokens leave so much to the others."""
    random = torch.randn(1, VOCABULARY, generator=torch.manual_seed(seed), dtype=torch.float64)
    sure, rest = random[:, :K].log_softmax(-1), random[:, K:].log_softmax(-1)
    return torch.cat([sure + torch.log1p(torch.tensor(-tail).double()), rest + torch.tensor(tail).double().log()], -1)


STUDENT, TEACHER = with_tail_of(TAIL, seed=0), with_tail_of(0.02, seed=1)


def found_gradient(divergence: str, logits: Tensor, teacher: Tensor, **fields: object) -> Tensor:
    parameter = PARAMETERS.get(divergence, 0.5)
    term = {"loss": "divergence", "divergence": divergence, "beta": parameter, "skew": parameter, "residual": False}
    objective = make_objective(**{"support": "topk", "support_size": K, "terms": {"main": {**term, **fields}}})
    tokens = make_tokens(torch.tensor([1]), {"teacher": teacher}, candidate_ids=torch.arange(K)[None])
    return gradient_of(evaluate(objective, logits, tokens))


def expected_gradient(divergence: str) -> Tensor:
    logits = STUDENT.clone().requires_grad_()
    buckets = [
        torch.cat([logprobs[:, :K], logprobs[:, K:].logsumexp(-1, keepdim=True)], dim=-1)
        for logprobs in (logits.log_softmax(-1), TEACHER)
    ]
    losses = BUCKET_DIVERGENCES[divergence](*buckets, PARAMETERS.get(divergence, 0.5))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    return gradient


@pytest.mark.parametrize("divergence", BUCKET_DIVERGENCES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_the_gradient_is_that_of_the_tail_that_the_logits_say(
    divergence: str, dtype: torch.dtype, tolerance: float
) -> None:
    expected = expected_gradient(divergence)
    found = found_gradient(divergence, STUDENT.to(dtype), TEACHER.to(dtype)).double()
    assert (found - expected).norm() < tolerance * expected.norm()
    if divergence == "forward_kl":
        assert found[:, K:].sum() == pytest.approx(-0.02, rel=1e-4)  # all that the teacher has there


def test_the_residual_takes_the_same_tail() -> None:
    """On average over sampled tokens, so that bucket and residual are the whole reverse KL."""
    objective = make_objective(support="topk", support_size=K)
    whole = STUDENT.clone().requires_grad_()
    logprobs = whole.log_softmax(-1)
    (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - TEACHER)).sum(), whole)
    found = torch.zeros_like(expected)
    for token, p in enumerate(STUDENT[0].exp()):
        candidates = torch.arange(K)[None]
        tokens = make_tokens(torch.tensor([token]), {"teacher": TEACHER}, STUDENT, candidates)
        found += p * gradient_of(evaluate(objective, STUDENT, tokens))
    assert (found - expected).norm() < 1e-8 * expected.norm()
    assert (found - expected)[:, K:].norm() < 1e-6 * expected[:, K:].norm()


def test_other_candidates_and_tokens_beside_a_small_tail_keep_their_gradient() -> None:
    """The second row's tail is large, and the first candidate of the third row takes no part."""
    rows = torch.cat([STUDENT, with_tail_of(0.1, seed=2), STUDENT])
    teachers = TEACHER.repeat(3, 1)
    term = {"main": {"loss": "divergence", "divergence": "forward_kl"}}
    objective = make_objective(support="intersection", support_size=K, terms=term)
    candidates = torch.arange(K).repeat(3, 1)
    candidates[2] = torch.tensor([VOCABULARY - 1, 1, 2])  # the first is not among the student's most likely
    tokens = make_tokens(torch.tensor([1, 5, 2]), {"teacher": teachers}, candidate_ids=candidates)
    found = gradient_of(evaluate(objective, rows, tokens))
    for row in range(3):
        one = make_tokens(
            tokens.target_ids[row : row + 1], {"teacher": TEACHER}, candidate_ids=candidates[row : row + 1]
        )
        alone = gradient_of(evaluate(objective, rows[row : row + 1], one))
        torch.testing.assert_close(found[row : row + 1], alone, atol=1e-14, rtol=1e-10)
    torch.testing.assert_close(found[:1], expected_gradient("forward_kl"), atol=1e-12, rtol=1e-8)


def test_a_candidate_that_takes_no_part_is_of_the_tail() -> None:
    outsider = K + int(STUDENT[0, K:].argmin())  # not among the student's most likely
    term = {"main": {"loss": "divergence", "divergence": "forward_kl"}}
    objective = make_objective(support="intersection", support_size=K + 1, terms=term)
    candidates = torch.tensor([[*range(K), outsider]])
    tokens = make_tokens(torch.tensor([1]), {"teacher": TEACHER}, candidate_ids=candidates)
    found = gradient_of(evaluate(objective, STUDENT, tokens))
    torch.testing.assert_close(found, expected_gradient("forward_kl"), atol=1e-12, rtol=1e-8)


@pytest.mark.parametrize("divergence", BUCKET_DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sure_student_that_equals_its_teacher_is_left_alone(divergence: str, dtype: torch.dtype) -> None:
    found = found_gradient(divergence, STUDENT.to(dtype), STUDENT.to(dtype))
    assert found.abs().max() < (1e-15 if dtype == torch.float64 else 1e-7)


def test_the_forward_kl_brings_a_lost_tail_back() -> None:
    logits = STUDENT.float()
    for _ in range(400):
        logits = logits - 10 * found_gradient("forward_kl", logits, TEACHER.float())
    tail = logits.softmax(-1)[:, K:].sum().item()
    assert 1e4 * SMALLEST_TAIL < tail < 0.02
