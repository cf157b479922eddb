"""Our objectives against values and statements that others published; each test names its source."""

import math

import pytest
import torch
from torch import Tensor

from learner.losses import forward_kl, jsd, reverse_kl, sampled_reverse_kl, with_tail_bucket


def log(*probabilities: float) -> Tensor:
    """Return log-probabilities of one token position, [1, k]."""
    return torch.tensor([probabilities]).log()


def test_student_support_reverse_kl_of_miles() -> None:
    """Miles, tests/fast/rollout/test_on_policy_distillation.py: p = (.6, .4), q = (.3, .7), to 1e-6."""
    expected = 0.6 * math.log(2) + 0.4 * math.log(0.4 / 0.7)
    # Both buckets cover everything, so the tail is the clamp's 1e-6 on both sides and adds nothing.
    assert reverse_kl(log(0.6, 0.4), log(0.3, 0.7), 1, 0.0).item() == pytest.approx(expected, abs=1e-6)


def test_tail_bucket_divergence_is_at_most_the_full_one() -> None:
    """Merging tokens into a bucket can only lose information (log-sum inequality; arXiv 2605.11182 A.3)."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 64, 50).log_softmax(-1)
    ids = teacher.topk(8).indices
    full = (student.exp() * (student - teacher)).sum(-1).sum().item()
    bucketed = reverse_kl(student.gather(-1, ids), teacher.gather(-1, ids), 1, 0.0).item()
    assert 0 < bucketed < full


def test_top_k_forward_kl_converges_to_the_full_one_as_k_grows() -> None:
    """AsyncOPD, tests/test_kl_loss.py: sparse KL tends to full KL with k (atol 1e-4, rtol 1e-3 at k = V)."""
    torch.manual_seed(1)
    student, teacher = (2 * torch.randn(2, 32, 100)).log_softmax(-1)
    full = torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True).item()
    errors = []
    for k in (4, 16, 64, 100):
        ids = teacher.topk(k).indices
        errors.append(abs(forward_kl(student.gather(-1, ids), teacher.gather(-1, ids), 1, 0.0).item() - full))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(0, abs=1e-3 * full + 1e-4)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_of_trl(beta: float) -> None:
    """TRL 1.16, GKDTrainer.generalized_jsd_loss: beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.6])
    m = (1 - beta) * p + beta * q
    expected = beta * (q * (q / m).log()).sum() + (1 - beta) * (p * (p / m).log()).sum()
    found = jsd(p.log()[None], q.log()[None], 1, beta)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


def test_raw_truncated_reverse_kl_pushes_away_from_the_teacher_and_ours_does_not() -> None:
    """Zhu et al. 2026 (arXiv 2605.11182, eq. 8): truncation leaves p (log p/q + 1), which is not 0 at p = q."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0]], requires_grad=True)
    topk = logits.log_softmax(-1)[:, :3]
    teacher = topk.detach()
    (raw,) = torch.autograd.grad((topk.exp() * (topk - teacher)).sum(), logits, retain_graph=True)
    (ours,) = torch.autograd.grad(reverse_kl(topk, teacher, 1, 0.0), logits)
    assert raw.norm() > 0.05
    assert ours.norm() < 1e-7


def test_stop_gradient_top_k_has_the_gradient_of_the_generalized_form() -> None:
    """Many Faces eq. 12 against MOPD (arXiv 2606.30406) eq. 5, on the top-k without a tail: the same gradient."""
    torch.manual_seed(2)
    logits = torch.randn(4, 20, requires_grad=True)
    teacher = torch.randn(4, 20).log_softmax(-1)[:, :6]
    student = logits.log_softmax(-1)[:, :6]
    stop_gradient = -(student.exp() * (teacher - student.detach())).sum()
    generalized = (student.exp() * (student - teacher) - student.exp() + teacher.exp()).sum()
    (first,) = torch.autograd.grad(stop_gradient, logits, retain_graph=True)
    (second,) = torch.autograd.grad(generalized, logits)
    assert torch.allclose(first, second, atol=1e-6)


def test_sampled_reverse_kl_is_the_policy_gradient_of_thinking_machines() -> None:
    """tinker-cookbook, train_on_policy.py: loss -sum ratio * A with A = log teacher - log sampler when on-policy."""
    student = torch.tensor([-1.0, -2.0], requires_grad=True)
    teacher = torch.tensor([-1.5, -0.5])
    sampled_reverse_kl(student, student.detach(), teacher, 1).backward()
    advantage = teacher - student.detach()
    assert student.grad is not None
    assert torch.allclose(student.grad, -advantage)


def test_a_masked_batch_gives_no_gradient_but_keeps_the_graph() -> None:
    """TRL, TestChunkedDivergenceLoss: a fully masked batch has loss 0 and gradients that exist and are all 0."""
    hidden = torch.randn(0, 5, requires_grad=True)
    loss = reverse_kl(hidden.log_softmax(-1), torch.empty(0, 5), 7, 0.0)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None


def test_the_tail_bucket_completes_the_distribution() -> None:
    """Miles issue 1322 and SDPO use K + 1 buckets; they must sum to 1 for the result to be a divergence."""
    torch.manual_seed(3)
    topk = torch.randn(16, 40).log_softmax(-1).topk(8).values
    assert torch.allclose(with_tail_bucket(topk).exp().sum(-1), torch.ones(16), atol=1e-6)
