"""Targets of one and of several models, and their normalisers."""

import math

import pytest
import torch
from torch import Tensor

from learner.loss.targets import log_linear, target_buckets
from tests.learner.loss.builders import random_logprobs


def log(*probabilities: float) -> Tensor:
    """Return log-probabilities of one token position, [1, k]."""
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_a_target_adds_up_log_probabilities() -> None:
    models = {"teacher": log(0.5, 0.2), "base": log(0.25, 0.4), "unused": log(0.0, 0.0)}
    found = log_linear({"teacher": 2.0, "base": -1.0, "unused": 0.0}, models)
    assert found.exp().tolist() == [pytest.approx([1.0, 0.1])]


@pytest.mark.parametrize("truncation", ["generalized", "tail"])
def test_one_model_of_coefficient_one_is_its_own_target(truncation: str) -> None:
    found = target_buckets({"teacher": 1.0, "base": 0.0}, {"teacher": log(0.5, 0.2)}, None, truncation)
    assert found.exp()[0, :2].tolist() == [0.5, pytest.approx(0.2)]


def test_mixed_candidates_are_normalised_with_the_tail() -> None:
    # Roots of (0.5 * 0.5, 0.2 * 0.05, 0.3 * 0.45): 0.5, 0.1, sqrt(0.135).
    models = {"teacher": log(0.5, 0.2), "base": log(0.5, 0.05)}
    total = 0.6 + math.sqrt(0.135)
    expected = [0.5 / total, 0.1 / total, math.sqrt(0.135) / total]
    halves = {"teacher": 0.5, "base": 0.5}
    assert target_buckets(halves, models, None, "tail").exp().tolist() == [pytest.approx(expected)]
    assert target_buckets(halves, models, None, "generalized").exp().tolist() == [pytest.approx(expected[:2])]
    renormalised = target_buckets(halves, models, None, "renormalized").exp()
    assert renormalised.tolist() == [pytest.approx([0.5 / 0.6, 0.1 / 0.6])]


def test_the_normaliser_over_buckets_is_exact_where_models_agree_inside_the_tail() -> None:
    tail = random_logprobs(1, 20, seed=0)
    heads = {"teacher": log(0.5, 0.3, 0.2), "base": log(0.1, 0.6, 0.3)}
    whole = {model: torch.cat([head[:, :2], head[:, 2:] + tail], dim=-1) for model, head in heads.items()}
    target = {"teacher": 1.5, "base": -0.5}
    exact = log_linear(target, whole).log_softmax(-1)
    candidates = {model: values[:, :2] for model, values in whole.items()}
    torch.testing.assert_close(target_buckets(target, candidates, None, "generalized"), exact[:, :2])


def test_an_impossible_token_stays_finite() -> None:
    models = {"teacher": torch.tensor([[-math.inf, 0.0]]), "base": torch.tensor([[0.0, -math.inf]])}
    for truncation in ("generalized", "renormalized", "tail"):
        for target in ({"teacher": 1.0}, {"teacher": 1.0, "base": -1.0}):
            assert target_buckets(target, models, None, truncation).isfinite().all()


def test_an_excluded_candidate_has_no_mass_in_a_target_whose_coefficients_cancel() -> None:
    models = {"teacher": log(0.5, 0.2), "base": log(0.25, 0.4)}
    inside = torch.tensor([[True, False]])
    found = target_buckets({"teacher": 1.0, "base": -1.0}, models, inside, "tail").exp()
    # Buckets 0.5 / 0.25 and, for everything else, 0.5 / 0.75.
    assert found.tolist() == [pytest.approx([2 / (2 + 2 / 3), 0, (2 / 3) / (2 + 2 / 3)])]
