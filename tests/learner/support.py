"""Hand-built trajectories, their scores, and a stand-in for a rollout actor."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from transformers import PreTrainedModel

from cluster.checksum import checksum
from cluster.contracts.interfaces import BatchHandle
from cluster.contracts.trajectory import (
    GeneratedTrajectory,
    TeacherScores,
    add_scores,
    generated_schema,
    make_generated,
    ragged,
    to_wire,
)

VOCABULARY = 112
TOP_K = 8


def make_scored(lengths: Sequence[tuple[int, int]], seed: int = 0) -> pa.RecordBatch:
    """Build trajectories of (prompt, completion) tokens, with random logprobs of a true distribution."""
    random = np.random.default_rng(seed)
    rows, scores = [], []
    for index, (prompt, completion) in enumerate(lengths):
        logits = random.normal(size=(completion, VOCABULARY)).astype(np.float32) * 2
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        token_ids = random.integers(2, VOCABULARY, prompt + completion).astype(np.int32)
        sampled = token_ids[prompt:, None].astype(np.int64)
        topk_ids = np.argsort(-logprobs, axis=-1)[:, :TOP_K]
        rows.append(
            GeneratedTrajectory(
                trajectory_id=index,
                prompt_id=index,
                sample_index=0,
                teacher="only",
                domain="",
                min_policy_version=0,
                max_policy_version=0,
                token_ids=token_ids,
                loss_mask=np.repeat(np.array([0, 1], np.uint8), [prompt, completion]),
                rollout_logprobs=random.normal(-4.7, 0.3, completion).astype(np.float32),
                finish_reason="stop",
                reward=None,
            )
        )
        scores.append(
            TeacherScores(
                np.take_along_axis(logprobs, sampled, -1)[:, 0],
                topk_ids.astype(np.int32),
                np.take_along_axis(logprobs, topk_ids, -1),
            )
        )
    return add_scores(make_generated(rows), scores)


def score_by(causal_lm: PreTrainedModel, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the batch as if the model itself had written and scored it."""
    rows, scores = batch.select([field.name for field in generated_schema()]).to_pylist(), []
    for row in rows:
        ids = torch.tensor(row["token_ids"])
        with torch.no_grad():
            logprobs = causal_lm(input_ids=ids[None]).logits[0].log_softmax(-1)[:-1]
        sampled = torch.tensor(row["loss_mask"][1:]) != 0
        topk = logprobs[sampled].topk(TOP_K)
        of_sampled = logprobs.gather(-1, ids[1:, None])[:, 0][sampled].numpy()
        scores.append(TeacherScores(of_sampled, topk.indices.int().numpy(), topk.values.numpy()))
    written = [
        GeneratedTrajectory(
            **{
                **row,
                "token_ids": np.array(row["token_ids"], np.int32),
                "loss_mask": np.array(row["loss_mask"], np.uint8),
                "rollout_logprobs": score.logprobs,
            }
        )
        for row, score in zip(rows, scores, strict=True)
    ]
    return add_scores(make_generated(written), scores)


def put_batch(batch: pa.RecordBatch) -> BatchHandle:
    """Put a batch into the object store as a pool would."""
    return BatchHandle(
        reference=ray.put(to_wire(batch)),
        teacher="only",
        trajectory_ids=tuple(batch["trajectory_id"].to_pylist()),
        num_tokens=tuple(ragged(batch, "token_ids").lengths.tolist()),
        num_completion_tokens=tuple(ragged(batch, "rollout_logprobs").lengths.tolist()),
    )


class Receiver:
    """A rollout actor's receiving verbs, keeping what arrives."""

    def __init__(self, is_deaf: bool = False) -> None:
        self._is_deaf = is_deaf
        self.events: list[str] = []
        self.payloads: list[bytes] = []
        self.weights: dict[str, np.ndarray] = {}

    def start_weight_update(self) -> None:
        self.events.append("start")
        self.payloads, self.weights = [], {}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        payload = ray.get(update_info["reference"][0])
        assert checksum([payload]) == update_info["checksum"]
        self.events.append("update")
        self.payloads.append(bytes(payload))
        start = 0
        for name, dtype, shape in zip(update_info["names"], update_info["dtypes"], update_info["shapes"], strict=True):
            values = np.frombuffer(payload, dtype, int(np.prod(shape)), start).reshape(shape)
            self.weights[name] = values.copy()
            start += values.nbytes

    def finish_weight_update(self, policy_version: int) -> str:
        self.events.append(f"finish {policy_version}")
        return checksum(self.payloads[1:] if self._is_deaf else self.payloads)

    def received(self) -> tuple[list[str], dict[str, np.ndarray]]:
        return self.events, self.weights
