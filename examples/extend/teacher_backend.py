"""Lets a table of token pairs teach: no model folder, no vLLM, no GPU.

[teachers.pairs]
model = "pairs.json"                                  # {"vocabulary": 112, "counts": [[previous, next, count], ...]}
backend = "examples.extend.teacher_backend:Bigrams"
engine.tensor_parallel = 0                            # GPUs that Ray reserves for each worker
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ModelError, ScoreError
from cluster.contracts.metrics import Metrics
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.signals import Scores
from cluster.contracts.trajectory import Ints, num_candidates_of, ragged
from cluster.models.model_checks import ModelFacts
from teacher_workers.backends.base import TeacherBackend

SMOOTHING = 0.1  # added to every count, so that no token is impossible


class Bigrams(TeacherBackend):
    """Predicts each token from the one before it, by smoothed counts."""

    signals = frozenset({"logprobs", "candidate_ids", "candidate_logprobs", "entropy"})

    def __init__(self, teacher: TeacherConfig, max_model_len: int, sleeps: bool = False) -> None:
        """Read the table; it fits any length of trajectory."""
        self.logprobs = read_table(Path(teacher.model))  # [vocabulary, vocabulary]: previous, next

    @classmethod
    def check(cls, teacher: TeacherConfig, student: ModelFacts) -> ModelFacts:
        """Check that the table has all of the student's token ids, which it reads as they are."""
        vocabulary = len(read_table(Path(teacher.model)))
        if vocabulary < student.vocabulary:
            raise ModelError(f"'{teacher.model}': has {vocabulary} tokens, and the student {student.vocabulary}")
        return replace(student, vocabulary=vocabulary)

    @classmethod
    def identity(cls, teacher: TeacherConfig) -> str:
        """Return a digest of the file."""
        return hashlib.sha256(Path(teacher.model).read_bytes()).hexdigest()

    async def score(self, batch: pa.RecordBatch, request: ScoreRequest) -> tuple[Scores, Metrics]:
        """Look every sampled token up."""
        given = request.given_candidates
        if given and not num_candidates_of(batch):
            raise ScoreError(f"{request.model} is to score candidates, but the batch has none")
        known, sampled = predictions(self.logprobs, batch)
        scores: dict[str, NDArray[Any]] = {"logprobs": known[np.arange(len(sampled)), sampled]}
        if request.top_k:
            best = np.argsort(-known, axis=1, kind="stable")[:, : request.top_k]
            scores["candidate_ids"] = best.astype(np.int32)
            scores["candidate_logprobs"] = np.take_along_axis(known, best, axis=1)
        elif given:
            ids = ragged(batch, "candidate_ids").values
            scores["candidate_logprobs"] = np.take_along_axis(known, ids.astype(np.int64), axis=1)
        if request.entropy:
            scores["entropy"] = -(np.exp(known) * known).sum(axis=1)
        return scores, {}


def predictions(logprobs: NDArray[np.float32], batch: pa.RecordBatch) -> tuple[NDArray[np.float32], Ints]:
    """Return [sampled_tokens, vocabulary] log-probabilities of what the place before each sampled token predicts."""
    token_ids, loss_mask = ragged(batch, "token_ids").values, ragged(batch, "loss_mask").values
    positions = np.flatnonzero(loss_mask)  # no row begins with a sampled token, so the place before is in the same row
    return logprobs[token_ids[positions - 1]], token_ids[positions]


def read_table(path: Path) -> NDArray[np.float32]:
    """Return the logarithm of each next token's share, [previous, next]."""
    try:
        table = json.loads(path.read_text())
        counts = np.full((table["vocabulary"], table["vocabulary"]), SMOOTHING)
        for previous, following, count in table["counts"]:
            counts[previous, following] += count
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ModelError(f"'{path}': is no table of token pairs: {error}") from error
    return np.log(counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)


def write_table(path: Path, vocabulary: int, texts: Iterable[Iterable[int]]) -> None:
    """Count the pairs of texts, each a list of token ids."""
    counts: dict[tuple[int, int], int] = {}
    for text in texts:
        for pair in pairwise(text):
            counts[pair] = counts.get(pair, 0) + 1
    entries = [[previous, following, count] for (previous, following), count in counts.items()]
    path.write_text(json.dumps({"vocabulary": vocabulary, "counts": entries}))
