"""The studies of the residual compare what they say they compare."""

from pathlib import Path

import pytest

from benchmarks.cases.residual_training import ARMS, config_of, rows_of
from benchmarks.cases.residual_variance import UNBIASED, measure_prefix
from cluster.config.terms import DivergenceTerm
from tests.learner.loss.builders import random_logprobs


def test_every_estimator_has_the_whole_gradient_in_expectation_and_the_tails_own_baseline_the_least_variance() -> None:
    found = measure_prefix(random_logprobs(12, seed=0), random_logprobs(12, seed=1), support_size=3)
    variances = {name: value for name, value in found.items() if name.startswith("variance")}
    assert min(variances, key=lambda name: variances[name]) == "variance, residual, tail's own baseline"
    for name in (*UNBIASED, "residual, no baseline", "residual, tail's own baseline"):
        assert found[f"bias, {name}"] < 1e-16 * found["squared length"]
    assert found["bias, tail"] > 1e-2 * found["squared length"]


def test_the_arms_differ_in_the_objective_alone(tmp_path: Path) -> None:
    terms = {arm: config_of(arm, 1, tmp_path).objective.terms["main"] for arm in ARMS}
    corrected = {arm: isinstance(term, DivergenceTerm) and term.has_residual for arm, term in terms.items()}
    assert corrected["tail-topk"]
    assert not corrected["tail-topk without residual"]
    assert config_of("exact-reverse-kl", 1, tmp_path).objective.support == "full"
    others = [
        {name: value for name, value in vars_of(arm, tmp_path).items() if name not in ("objective", "written")}
        for arm in ARMS
    ]
    assert others[0] == others[1] == others[2]


def vars_of(arm: str, folder: Path) -> dict[str, object]:
    config = config_of(arm, 1, folder)
    return {name: getattr(config, name) for name in config.__struct_fields__}


def test_the_bar_is_of_the_means_of_the_seeds() -> None:
    outcomes = [
        {"arm": arm, "seed": seed, "before": 0.7, "after": after, "steps": 12}
        for arm, seed, after in [
            ("tail-topk", 0, 0.4),
            ("tail-topk", 1, 0.5),
            ("exact-reverse-kl", 0, 0.4),
            ("exact-reverse-kl", 1, 0.4),
        ]
    ]
    bar = rows_of(outcomes)[-1]
    assert (bar["value"], bar["met"]) == (pytest.approx(1.125), True)
