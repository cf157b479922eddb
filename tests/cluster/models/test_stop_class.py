"""One token of several ids: probabilities, and the gradient back to each of them."""

import torch

from cluster.models.stop_class import merge_ids, merge_logits, split_gradient

STOPS = (4, 1, 6)


def random_logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(5, 9, generator=torch.manual_seed(seed), dtype=torch.float64) * 3


def test_the_first_id_gets_the_probability_of_all_and_the_others_none() -> None:
    logits = random_logits()
    before = logits.softmax(-1)
    merge_logits(logits, STOPS)
    after = logits.softmax(-1)
    torch.testing.assert_close(after[:, 4], before[:, list(STOPS)].sum(-1))
    assert after[:, [1, 6]].abs().max() == 0
    others = [0, 2, 3, 5, 7, 8]
    torch.testing.assert_close(after[:, others], before[:, others])
    assert (after * logits).isfinite().all()


def test_rows_that_do_not_ask_for_it_keep_their_logits() -> None:
    logits, all_rows = random_logits(), random_logits()
    before, rows = logits.clone(), torch.tensor([True, False, False, True, False])
    merge_logits(logits, STOPS, rows)
    merge_logits(all_rows, STOPS)
    assert torch.equal(logits[~rows], before[~rows])
    assert torch.equal(logits[rows], all_rows[rows])


def test_the_gradient_by_each_id_is_that_of_autograd_through_the_sum() -> None:
    weights = torch.randn(5, 9, generator=torch.manual_seed(1), dtype=torch.float64)
    weights[:, [1, 6]] = 0  # ids without a probability have no log-probability
    plain = random_logits().requires_grad_()
    total = plain[:, list(STOPS)].logsumexp(-1, keepdim=True)
    merged = torch.cat([plain[:, :4], total, plain[:, 5:]], dim=-1)
    alive = [0, 2, 3, 4, 5, 7, 8]
    (merged[:, alive].log_softmax(-1) * weights[:, alive]).sum().backward()
    logits = random_logits()
    shares = merge_logits(logits, STOPS)
    gradient = weights - logits.softmax(-1) * weights.sum(-1, keepdim=True)
    split_gradient(gradient, STOPS, shares)
    torch.testing.assert_close(gradient, plain.grad, atol=1e-12, rtol=0)


def test_ids_of_any_shape_become_the_first_of_their_class() -> None:
    ids = torch.tensor([[4, 1], [6, 2]])
    assert merge_ids(ids, STOPS).tolist() == [[4, 4], [4, 2]]
    assert merge_ids(ids, ()) is ids
