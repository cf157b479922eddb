"""The candidates that real vLLM rollout actors choose, against transformers at the same prefixes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cluster.contracts.errors import RolloutError
from cluster.contracts.requests import SamplingSettings
from cluster.models.stop_class import merge_logits
from tests.rollout_workers.deployment import NUM_PROMPTS, RolloutDeployment, version_of_each_token
from tests.tiny_qwen3 import EOS, HALT, NUM_WORDS, expected_logprobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first test waits for the engines to start


def with_candidates(count: int, max_completion_tokens: int = 32, temperature: float = 1.0) -> SamplingSettings:
    return SamplingSettings(max_completion_tokens, temperature, num_candidates=count, candidates="sampled")


def expected(rollouts: RolloutDeployment, row: dict[str, Any], temperature: float = 1.0) -> torch.Tensor:
    """Return [completion_tokens, vocabulary] by transformers."""
    sampled = np.flatnonzero(row["loss_mask"])
    return expected_logprobs(rollouts.student, row["token_ids"].tolist(), temperature)[sampled - 1]


def expected_of_class(
    rollouts: RolloutDeployment, row: dict[str, Any], stop_class: Sequence[int], temperature: float
) -> torch.Tensor:
    """Return the same of a model that has one token in place of the class, before the temperature."""
    before = expected(rollouts, row).clone()
    merge_logits(before, stop_class)
    return (before / temperature).log_softmax(-1)


def gaps(row: dict[str, Any], expected: torch.Tensor) -> torch.Tensor:
    """Return [completion_tokens]: how far the candidates' log-probabilities are off at worst."""
    at_candidates = expected.gather(-1, torch.tensor(row["candidate_ids"]).long())
    return (at_candidates - torch.tensor(row["candidate_rollout_logprobs"])).abs().amax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_most_likely_tokens_are_those_of_transformers_best_first(
    rollouts: RolloutDeployment, temperature: float
) -> None:
    sampling = SamplingSettings(32, temperature, num_candidates=24)
    for row in rollouts.generate(rollouts.requests([0, 1, 2]), sampling):
        best = expected(rollouts, row, temperature).topk(24)
        assert torch.tensor(row["candidate_rollout_logprobs"]).allclose(best.values, rtol=0, atol=1e-4)
        assert gaps(row, expected(rollouts, row, temperature)).max() < 1e-4  # the ids belong to these values


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_candidates_carry_their_log_probability_under_the_sampling_distribution(
    rollouts: RolloutDeployment, temperature: float
) -> None:
    rows = rollouts.generate(rollouts.requests([0, 1, 2, 3]), with_candidates(7, temperature=temperature))
    for row in rows:
        assert row["candidate_ids"].shape == (len(row["rollout_logprobs"]), 7)
        assert gaps(row, expected(rollouts, row, temperature)).max() < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_candidates_follow_the_sampling_distribution(rollouts: RolloutDeployment, temperature: float) -> None:
    rollouts.restore_weights()
    rows = rollouts.generate(rollouts.requests([3] * 64), with_candidates(100, 1, temperature))
    ids = np.concatenate([row["candidate_ids"][0] for row in rows])
    counts = torch.from_numpy(ids).bincount(minlength=NUM_WORDS).double()
    wanted = 6400 * expected(rollouts, rows[0], temperature)[0].double().exp()
    rare = wanted < 5  # too few for the approximation; they count as one token
    wanted = torch.cat([wanted[~rare], wanted[rare].sum(0, keepdim=True)])
    counts = torch.cat([counts[~rare], counts[rare].sum(0, keepdim=True)])
    freedom = len(wanted) - 1
    assert freedom > 20
    assert ((counts - wanted) ** 2 / wanted).sum() < freedom + 5 * (2 * freedom) ** 0.5  # mean and five deviations


def test_sampled_candidates_are_independent_of_the_sampled_token_and_of_each_other(rollouts: RolloutDeployment) -> None:
    rows = rollouts.generate(rollouts.requests([index % NUM_PROMPTS for index in range(32)]), with_candidates(8, 48))
    surplus, variance = np.zeros(2), np.zeros(2)
    for row in rows:
        probabilities = expected(rollouts, row).double().exp().numpy()
        ids, at = row["candidate_ids"], np.arange(len(row["candidate_ids"]))[:, None]
        written = row["token_ids"][-len(ids) :, None]
        # An independent draw repeats a given token as often as that token is probable.
        for pair, (repeats, given) in enumerate([(ids == written, written), (ids[:, 1:] == ids[:, :1], ids[:, :1])]):
            chance = probabilities[at, given] * repeats.shape[1]
            surplus[pair] += repeats.sum() - chance.sum()
            variance[pair] += (chance * (1 - probabilities[at, given])).sum()
    assert (np.abs(surplus) < 5 * np.sqrt(variance)).all()
    assert (variance > 100).all()  # enough to see an excess of 50 in some thousand draws


def test_the_same_seed_draws_the_same_beside_other_requests(rollouts: RolloutDeployment) -> None:
    [alone] = rollouts.generate(rollouts.requests([5], seed=7), with_candidates(4))
    among = rollouts.generate(rollouts.requests([5, 6, 1, 2, 5], seed=7), with_candidates(4))
    assert alone["candidate_ids"].tolist() == among[0]["candidate_ids"].tolist()
    assert alone["candidate_ids"][0].tolist() != among[4]["candidate_ids"][0].tolist()  # the same prompt, another seed


def test_new_weights_leave_no_gap_and_no_repetition_in_running_requests(rollouts: RolloutDeployment) -> None:
    weights, rows = rollouts.generate_across_updates([*range(NUM_PROMPTS)] * 6, with_candidates(3, 400))
    by_token = np.concatenate([version_of_each_token(row) for row in rows])
    for version, kept in weights.items():
        rollouts.student.load_state_dict(kept)
        gap = torch.cat([gaps(row, expected(rollouts, row)) for row in rows]).numpy()
        assert gap[by_token == version].max() < 1e-4
        assert np.median(gap[by_token != version]) > 1e-2


def test_sampled_candidates_beside_a_truncated_distribution_are_refused(rollouts: RolloutDeployment) -> None:
    sampling = SamplingSettings(4, 1.0, top_p=0.5, num_candidates=2, candidates="sampled")
    with pytest.raises(RolloutError, match="sampled candidates come from the whole distribution"):
        rollouts.generate(rollouts.requests([0]), sampling)


def test_without_candidates_there_are_no_columns_for_them(rollouts: RolloutDeployment) -> None:
    [row] = rollouts.generate(rollouts.requests([0]), SamplingSettings(4, 1.0))
    assert not [name for name in row if "candidate" in name]


@pytest.mark.parametrize("candidates", ["topk", "sampled"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ids_that_end_completions_are_written_and_scored_as_one(
    rollouts: RolloutDeployment, temperature: float, candidates: Any
) -> None:
    stops = (EOS, HALT, *range(10, 16))
    sampling = SamplingSettings(
        24, temperature, stop_token_ids=stops, stop_class=stops, num_candidates=6, candidates=candidates
    )
    rows = rollouts.generate(rollouts.requests(list(range(NUM_PROMPTS)) * 2), sampling)
    assert sum(row["finish_reason"] == "stop" for row in rows) > 5
    for row in rows:
        wanted = expected_of_class(rollouts, row, stops, temperature)
        written = row["token_ids"][row["loss_mask"] != 0]
        assert not np.isin(written, stops[1:]).any()
        assert (written[-1] == EOS) == (row["finish_reason"] == "stop")
        of_written = wanted.gather(-1, torch.from_numpy(written).long()[:, None])[:, 0]
        assert (of_written - torch.tensor(row["rollout_logprobs"])).abs().max() < 1e-4
        assert gaps(row, wanted).max() < 1e-4
        assert not np.isin(row["candidate_ids"], stops[1:]).any()
