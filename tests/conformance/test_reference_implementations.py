"""GKD's divergence as TRL and Liger compute it, forward and backward: references that we did not write.

Their conventions, which are ours: beta = 0 is the forward KL(teacher || student), beta = 1 the reverse, in between
m = (1 - beta) student + beta teacher.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.learner.loss.builders import evaluate, gradient_of, make_objective, make_tokens

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
TOKENS, WIDTH, VOCABULARY = 12, 8, 53
WHY = "only the development environment has it"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def case(scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the student's hidden states and head, then the teacher's."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, WIDTH), (VOCABULARY, WIDTH)] * 2
    hidden, head, teacher_hidden, teacher_head = (torch.randn(shape, generator=generator) for shape in shapes)
    return hidden, scale * head, teacher_hidden, scale * teacher_head


def ours(beta: float, logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of losses and its gradient by the student's logits."""
    term = {"loss": "divergence", "divergence": "jsd", "beta": beta}
    objective = make_objective(support="full", terms={"main": term})
    models = {"teacher": teacher_logits}
    tokens = make_tokens(torch.zeros(TOKENS, dtype=torch.long), models)
    results = evaluate(objective, logits, tokens, models)
    return results.losses.sum(), gradient_of(results)


def assert_agrees(beta: float, scale: float, theirs: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Compare our loss per token, and our gradient by the hidden states and by the head, with theirs."""
    hidden, head, teacher_hidden, teacher_head = case(scale)
    leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    expected = theirs(*leaves, teacher_hidden, teacher_head)
    by_hidden, by_head = torch.autograd.grad(expected, leaves)
    total, gradient = ours(beta, hidden @ head.T, teacher_hidden @ teacher_head.T)
    torch.testing.assert_close(total / TOKENS, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient @ head / TOKENS, by_hidden, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient.T @ hidden / TOKENS, by_head, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_agrees_with_gkd_of_trl(beta: float, scale: float) -> None:
    """TRL 1.16, GKDTrainer.generalized_jsd_loss, on materialised logits."""
    gkd = pytest.importorskip("trl.experimental.gkd", reason=WHY, exc_type=ImportError)

    def theirs(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        logits, teacher_logits = hidden @ head.T, teacher_hidden @ teacher_head.T
        loss: Tensor = gkd.GKDTrainer.generalized_jsd_loss(
            logits[None], teacher_logits[None], torch.zeros(1, TOKENS, dtype=torch.long), beta=beta
        )
        return loss

    assert_agrees(beta, scale, theirs)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_agrees_with_the_chunked_divergence_of_trl(beta: float, scale: float) -> None:
    """TRL 1.16, DistillationTrainer, which never materialises the logits."""
    trainer = pytest.importorskip("trl.trainer.distillation_trainer", reason=WHY, exc_type=ImportError)

    def theirs(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        loss: Tensor = trainer._chunked_divergence_loss(
            hidden[None], teacher_hidden[None], head, teacher_head, torch.ones(1, TOKENS, dtype=torch.long), beta
        )[0]
        return loss

    assert_agrees(beta, scale, theirs)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_agrees_with_the_fused_jsd_of_liger(beta: float, scale: float) -> None:
    """Liger 0.8.5, LigerFusedLinearJSDLoss."""
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason=WHY, exc_type=ImportError)

    def theirs(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        fused = chunked.LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, compiled=False, chunk_size=5)
        loss: Tensor = fused(hidden, head, teacher_hidden, teacher_head, torch.zeros(TOKENS, dtype=torch.long))
        return loss

    assert_agrees(beta, scale, theirs)
