"""The environment of two turns on a real rollout actor against transformers."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from cluster.config.sections import EnvironmentConfig
from cluster.contracts.requests import SamplingSettings
from tests.rollout_workers.deployment import NUM_PROMPTS, RolloutDeployment, deployed, version_of_each_token
from tests.tiny_qwen3 import EOS, HALT, expected_logprobs, write_tiny_qwen3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KIND = "examples.extend.two_turn_environment:SecondTry"
HINT_IDS = [2, 2]  # the tiny model knows neither of its two words
MAX_TOKENS = 300
WITH_ANSWER = [index for index in range(NUM_PROMPTS) if index % 2 == 0]


@pytest.fixture(scope="module")
def rollouts(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutDeployment]:
    folder = write_tiny_qwen3(tmp_path_factory.mktemp("student"))
    environment = EnvironmentConfig(KIND, "exact", max_observation_tokens=2)
    with deployed(folder, environment=environment, sampled_candidates=True) as deployment:
        yield deployment


def sampled_spans(row: dict[str, Any]) -> list[tuple[int, int]]:
    """Return where each sampled span begins and ends."""
    edges = np.flatnonzero(np.diff(row["loss_mask"], prepend=0, append=0))
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]


def has_two_turns(row: dict[str, Any]) -> bool:
    return len(sampled_spans(row)) == 2


def two_turns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [row for row in rows if has_two_turns(row)]
    assert len(found) >= 5
    return found


def reference(rollouts: RolloutDeployment, row: dict[str, Any]) -> torch.Tensor:
    """Return [completion_tokens, vocabulary] of one forward pass over the whole row."""
    return expected_logprobs(rollouts.student, row["token_ids"].tolist())[np.flatnonzero(row["loss_mask"]) - 1]


def gaps(rollouts: RolloutDeployment, row: dict[str, Any]) -> np.ndarray:
    sampled = torch.from_numpy(row["token_ids"][row["loss_mask"] != 0]).long()
    expected = reference(rollouts, row).gather(1, sampled[:, None])[:, 0]
    return np.asarray(np.abs(expected.numpy() - row["rollout_logprobs"]))


def test_the_hint_follows_a_wrong_answer_and_both_answers_are_the_models_own(rollouts: RolloutDeployment) -> None:
    requests = rollouts.requests(WITH_ANSWER * 8)
    rows = rollouts.generate(requests, SamplingSettings(MAX_TOKENS, 1.0, stop=("halt",)))
    for row in two_turns(rows):
        prompt = rollouts.prompts.prompt(row["prompt_id"]).token_ids.tolist()
        (begin, hint), (second, end) = sampled_spans(row)
        assert (begin, end) == (len(prompt), len(row["token_ids"]))
        assert row["token_ids"][:begin].tolist() == prompt
        assert row["token_ids"][hint - 1] in (EOS, HALT)  # the student ended its first answer
        assert row["token_ids"][hint:second].tolist() == HINT_IDS
        assert gaps(rollouts, row).max() < 1e-4
        assert row["reward"] == 0.0
    for row in rows:
        assert len(row["rollout_logprobs"]) <= MAX_TOKENS
        assert row["finish_reason"] == ("stop" if row["token_ids"][-1] in (EOS, HALT) else "length")
    # A trajectory repeats with its seed, the second answer too; the second answer is no repetition of the first.
    again = rollouts.generate(requests, SamplingSettings(MAX_TOKENS, 1.0, stop=("halt",)))
    assert [row["token_ids"].tolist() for row in rows] == [row["token_ids"].tolist() for row in again]


@pytest.mark.parametrize("candidates", ["topk", "sampled"])
def test_candidates_stand_beside_the_tokens_of_both_answers(rollouts: RolloutDeployment, candidates: Any) -> None:
    sampling = SamplingSettings(MAX_TOKENS, 1.0, stop=("halt",), num_candidates=3, candidates=candidates)
    for row in two_turns(rollouts.generate(rollouts.requests(WITH_ANSWER * 4), sampling)):
        ids = torch.from_numpy(row["candidate_ids"]).long()
        expected = reference(rollouts, row)
        given = torch.from_numpy(row["candidate_rollout_logprobs"].copy())
        assert torch.allclose(expected.gather(1, ids), given, rtol=0, atol=1e-4)
        if candidates == "topk":
            assert torch.allclose(expected.topk(3).values, given, rtol=0, atol=1e-4)


def test_each_token_names_the_version_that_sampled_it_across_the_hint(rollouts: RolloutDeployment) -> None:
    sampling = SamplingSettings(MAX_TOKENS, 1.0, stop=("halt",))
    weights, rows = rollouts.generate_across_updates(WITH_ANSWER * 16, sampling, is_wanted=has_two_turns)
    rows = two_turns(rows)
    versions = [version_of_each_token(row) for row in rows]
    for version, kept in weights.items():
        rollouts.student.load_state_dict(kept)
        for row, by_token in zip(rows, versions, strict=True):
            assert (gaps(rollouts, row)[by_token == version] < 1e-4).all()
