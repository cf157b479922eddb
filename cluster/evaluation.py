"""Held-out prompts through a rollout pool: how often the verifier agrees, how long the completions are."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cluster.actors import get
from cluster.contracts.config import Config
from cluster.contracts.interfaces import BatchHandle
from cluster.contracts.metrics import merge, report
from cluster.contracts.trajectory import from_wire, ragged
from cluster.pipeline import Inputs, held_out_requests, held_out_sampling
from rollout_workers.pool import RolloutPool

SAMPLES_KEPT = 8  # completions per evaluation that are written out for people


@dataclass(frozen=True)
class Evaluation:
    """What one model did on the held-out prompts."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]  # a few prompts with their completions

    @property
    def accuracy(self) -> float | None:
        """Return the share of right completions; None when no prompt has an answer."""
        return self.metrics.get("rollout/reward")


def evaluate(pool: RolloutPool, config: Config, inputs: Inputs, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
    """Sample every held-out prompt and verify; a model that is asked twice draws with the same seeds."""
    requests = held_out_requests(config, inputs)
    handles = list(pool.generate(requests, held_out_sampling(config), config.evaluation.verifier))
    figures = report(merge(handle.metrics for handle in handles))
    return Evaluation(figures, read_samples(handles, config, inputs, tokenizer))


def read_samples(
    handles: Iterable[BatchHandle], config: Config, inputs: Inputs, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Fetch the completions of the first few held-out prompts and decode them for people."""
    wanted = set(range(min(SAMPLES_KEPT, len(inputs.held_out_ids)) * config.evaluation.samples_per_prompt))
    samples = []
    for handle in handles:
        if not wanted.intersection(handle.trajectory_ids):
            continue
        batch = from_wire(get(handle.reference, config.ray.call_timeout_seconds, "held-out completions"))
        token_ids, loss_mask = ragged(batch, "token_ids"), ragged(batch, "loss_mask")
        for row, trajectory_id in enumerate(handle.trajectory_ids):
            if trajectory_id not in wanted:
                continue
            completion = token_ids[row][loss_mask[row] != 0].tolist()
            samples.append(
                {
                    "trajectory_id": trajectory_id,
                    "prompt": inputs.prompts.text(batch["prompt_id"][row].as_py()),
                    "completion": tokenizer.decode(completion, skip_special_tokens=True),
                    "reward": batch["reward"][row].as_py(),
                }
            )
    return sorted(samples, key=lambda sample: sample["trajectory_id"])


def write_samples(path: Path, step: int, model: str, samples: Sequence[dict[str, Any]]) -> None:
    """Append the samples to samples.jsonl."""
    with path.open("a", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps({"step": step, "model": model, **sample}, ensure_ascii=False) + "\n")
