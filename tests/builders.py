"""Makes trajectories, prompts and configurations with defaults, so that a test names only what it varies."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.config.run_config import Config
from cluster.config.run_file import parse_run_config
from cluster.contracts.signals import Scores
from cluster.contracts.trajectory import GeneratedTrajectory

MINIMAL_RUN = '[student]\nmodel = "student"\n[teachers.main]\nmodel = "teacher"\n[prompts]\ntrain = "train.jsonl"\n'


def make_config(*overrides: str) -> Config:
    """Build the smallest valid configuration, then apply overrides."""
    return parse_run_config(MINIMAL_RUN, overrides)


def make_trajectory(
    prompt: Sequence[int] = (1, 2), completion: Sequence[int] = (3, 4, 5), **fields: Any
) -> GeneratedTrajectory:
    """Build one trajectory whose student gave every token a probability of one half."""
    defaults: dict[str, Any] = {
        "trajectory_id": 0,
        "prompt_id": 0,
        "sample_index": 0,
        "teacher": "main",
        "domain": "",
        "min_policy_version": 0,
        "max_policy_version": 0,
        "token_ids": np.array([*prompt, *completion], dtype=np.int32),
        "loss_mask": np.array([0] * len(prompt) + [1] * len(completion), dtype=np.uint8),
        "rollout_logprobs": np.full(len(completion), np.log(0.5), dtype=np.float32),
        "finish_reason": "stop",
        "reward": None,
    }
    return GeneratedTrajectory(**{**defaults, **fields})


def make_scores(completion_tokens: int, top_k: int = 0, logprob: float = -1.0) -> Scores:
    """Build scores that give every token the same log-probability; the candidates are tokens 0 to top_k - 1."""
    logprobs = np.full(completion_tokens, logprob, dtype=np.float32)
    if not top_k:
        return {"logprobs": logprobs}
    ids = np.tile(np.arange(top_k, dtype=np.int32), (completion_tokens, 1))
    candidate_logprobs = np.full((completion_tokens, top_k), logprob, dtype=np.float32)
    return {"logprobs": logprobs, "candidate_ids": ids, "candidate_logprobs": candidate_logprobs}
