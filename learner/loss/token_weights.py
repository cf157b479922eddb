"""Computes what needs a whole trajectory at once: returns-to-go, sequence masks, token weights.

All arguments cover the completion tokens of whole trajectories, those of one trajectory together and in order. Sums are
taken in float64 and trajectory by trajectory, so other trajectories in the batch never change a result.
"""

import torch
from torch import Tensor

SMALLEST_ENTROPY = 1e-6  # nats; a trajectory whose largest entropy is below it counts as wholly sure


def later_returns(advantages: Tensor, trajectory: Tensor, discount: float) -> Tensor:
    """Return the sum over the later tokens of the trajectory of discount**distance times their advantage, [n]."""
    return (_sums_from_here(advantages, trajectory, discount) - advantages).to(advantages.dtype)


def is_trusted_trajectory(student: Tensor, rollout: Tensor, trajectory: Tensor, low: float, high: float) -> Tensor:
    """Return whether the geometric mean of student / rollout probability over the trajectory is in [low, high], [n]."""
    mean = _mean_of_trajectory(student - rollout, trajectory).exp()
    return (mean >= low) & (mean <= high)


def is_early(position: Tensor, length: Tensor, tokens: int | None, fraction: float | None, skipped: int = 0) -> Tensor:
    """Return whether the token is one of the first so many, and in the first fraction, of its completion, [n].

    The first `skipped` are not.
    """
    early = position >= skipped
    if tokens is not None:
        early &= position < tokens
    if fraction is not None:
        early &= position < fraction * length
    return early


def turn_weights(turn: Tensor, trajectory: Tensor) -> Tensor:
    """Return tokens of the trajectory / (its turns x tokens of the turn): all its turns count alike, mean 1, [n].

    TurnOPD (arXiv 2607.05804).
    """
    begins = torch.ones_like(turn)
    begins[1:] = (turn[1:] != turn[:-1]) | (trajectory[1:] != trajectory[:-1])
    run = begins.cumsum(0) - 1
    ones = torch.ones_like(turn, dtype=torch.float64)
    num_turns = _sum_of_trajectory(begins.double(), trajectory)
    weights = _sum_of_trajectory(ones, trajectory) / (num_turns * _sum_of_trajectory(ones, run))
    return weights.float()


def position_importance(log_ratio: Tensor, trajectory: Tensor, extra: float) -> Tensor:
    """Return 1 + extra (1 - share of the trajectory's |log-ratio| before the token) (IW-OPD, arXiv 2606.22600), [n]."""
    size = log_ratio.abs().double()
    total = _sum_of_trajectory(size, trajectory)
    before = total - _sums_from_here(size, trajectory, 1.0)
    share = torch.where(total > 0, before / total, 0.0).clamp(0.0, 1.0)
    return (1 + extra * (1 - share)).to(log_ratio.dtype)


def entropy_weights(sure: Tensor | None, unsure: Tensor | None, trajectory: Tensor) -> Tensor:
    """Return weights of mean 1 in each trajectory that favour tokens by entropy (FiRe, arXiv 2606.02684), [n].

    (2 - sure / its largest) (1 + unsure / its largest). FiRe's code takes the largest and the mean over the mini-batch;
    here they are the trajectory's, so that what else is in the batch does not matter. `sure` are entropies of the model
    that should be sure, the teacher, and `unsure` the student's; None does not count.
    """
    weights = torch.ones_like(trajectory, dtype=torch.float64)
    if sure is not None:
        weights = weights * (2 - _share_of_largest(sure, trajectory))
    if unsure is not None:
        weights = weights * (1 + _share_of_largest(unsure, trajectory))
    return (weights / _mean_of_trajectory(weights, trajectory)).float()


def weighted_mean_of_trajectory(values: Tensor, weights: Tensor, trajectory: Tensor) -> Tensor:
    """Return the trajectory's mean of the values by weight, 0 where nothing of it counts, [n]."""
    counted = _sum_of_trajectory(weights, trajectory)
    return torch.where(counted > 0, _sum_of_trajectory(weights * values, trajectory) / counted, 0.0).to(values.dtype)


def _sums_from_here(values: Tensor, trajectory: Tensor, discount: float) -> Tensor:
    """Return the sum over this and the later tokens of the trajectory of discount**distance times value, float64.

    Doubling windows: after the step of width w, each token has the sum over the 2 w tokens that begin with it.
    """
    sums, width = values.double(), 1
    while width < len(sums):
        is_same = trajectory[width:] == trajectory[:-width]
        if not is_same.any():
            break
        farther = torch.where(is_same, sums[width:], 0.0) * discount**width
        sums = torch.cat([sums[:-width] + farther, sums[-width:]])
        width *= 2
    return sums


def _sum_of_trajectory(values: Tensor, trajectory: Tensor) -> Tensor:
    return _zeros(values, trajectory).index_add_(0, trajectory, values.double())[trajectory]


def _mean_of_trajectory(values: Tensor, trajectory: Tensor) -> Tensor:
    return _sum_of_trajectory(values, trajectory) / _sum_of_trajectory(torch.ones_like(values), trajectory)


def _share_of_largest(entropy: Tensor, trajectory: Tensor) -> Tensor:
    entropy = entropy.double().clamp(min=0.0)
    largest = _zeros(entropy, trajectory).scatter_reduce_(0, trajectory, entropy, "amax")[trajectory]
    return entropy / largest.clamp(min=SMALLEST_ENTROPY)


def _zeros(values: Tensor, trajectory: Tensor) -> Tensor:
    count = int(trajectory.max()) + 1 if len(trajectory) else 0
    return values.new_zeros(count, dtype=torch.float64)
