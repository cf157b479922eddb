"""Maps of the log-ratio, at numbers derived by hand."""

import math

import pytest
import torch

from cluster.config.terms import PolicyGradientTerm
from learner.loss.policy_gradient import LOG_RATIO_MAPS

TARGET, STUDENT = 0.4, 0.1  # D = log 4
LOG_4 = math.log(4)


def mapped(name: str, target: float, student: float, **shape: float) -> float:
    """Return the map of one pair of probabilities."""
    log_target, log_student = torch.tensor([target, student], dtype=torch.float64).log()
    return float(LOG_RATIO_MAPS[name](log_target, log_student, PolicyGradientTerm(**shape)))


@pytest.mark.parametrize(
    ("name", "shape", "above", "below"),
    [
        ("identity", {}, LOG_4, -LOG_4),
        ("clip", {"bound": 1.0}, 1.0, -1.0),
        ("clip", {"bound": 5.0}, LOG_4, -LOG_4),
        ("soft_log", {}, math.log(1 + LOG_4), -math.log(1 + LOG_4)),
        # tanh(log 4 / 2) = (4 - 1) / (4 + 1)
        ("tanh", {"bound": 10.0, "scale": 2.0}, 6.0, -6.0),
        ("power", {"alpha": 1.0}, 0.3, -0.3),
        ("power", {"alpha": 2.0}, 0.15, -0.15),
        # 0.2 * 4 + 0.8 and 0.2 / 4 + 0.8
        ("proximal", {"alpha": 0.2}, math.log(1.6), math.log(0.85)),
        ("proximal", {"alpha": 1.0}, LOG_4, -LOG_4),
        ("forward_kl", {}, 3.0, -0.75),
        ("jsd", {}, 0.5 * math.log(5 / 2), 0.5 * math.log(5 / 8)),
    ],
)
def test_each_map_has_the_value_derived_by_hand(name: str, shape: dict[str, float], above: float, below: float) -> None:
    assert mapped(name, TARGET, STUDENT, **shape) == pytest.approx(above, abs=1e-12)
    assert mapped(name, STUDENT, TARGET, **shape) == pytest.approx(below, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in LOG_RATIO_MAPS if name != "constant"])
def test_every_map_is_0_where_target_and_student_agree(name: str) -> None:
    assert mapped(name, 0.3, 0.3, alpha=0.7) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", LOG_RATIO_MAPS)
def test_every_map_is_finite_at_the_ends_of_float32(name: str) -> None:
    lowest, highest = torch.tensor([-87.0, 0.0]), torch.tensor([0.0, -87.0])
    assert LOG_RATIO_MAPS[name](lowest, highest, PolicyGradientTerm(alpha=0.5)).isfinite().all()


def test_the_proximal_teacher_never_falls_below_its_bound() -> None:
    assert mapped("proximal", 1e-30, 1.0, alpha=0.1) == pytest.approx(math.log(0.9))
