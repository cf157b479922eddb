"""One rank of the learner: scored trajectories in, new weights out. It knows nothing of how it is deployed."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import torch
import transformers
from ray.actor import ActorHandle

from cluster.contracts.config import Config, Divergence
from cluster.contracts.errors import ConfigError
from cluster.contracts.metrics import Metric
from cluster.contracts.trajectory import Floats, TeacherScores, add_scores, ragged, stage_of, top_k_of
from cluster.contracts.weights import WeightSyncReport
from cluster.model_files import load_tokenizer
from learner import checkpoint
from learner.engine import TrainEngine
from learner.lr_schedule import learning_rate_at
from learner.micro_batch import MicroBatch, build_micro_batch, trajectories
from learner.model import load_student
from learner.packing import Grid, plan_step
from learner.train_step import measure_gradient, train_step
from learner.weight_sender import ObjectStoreSender, WeightSender


class LearnerWorker:
    """Trains the student as one rank of its group; every method is collective unless it says otherwise.

    Args:
        config: the whole run.
        engine: holds the weights of this rank.
    """

    def __init__(self, config: Config, engine: TrainEngine) -> None:
        self._config = config
        self._engine = engine
        self._sender = _make_sender(config, engine)

    def step(
        self, batches: Sequence[pa.RecordBatch], grids: Sequence[Grid], num_tokens: int, step: int
    ) -> dict[str, Metric]:
        """Run this rank's share of one optimizer step.

        Args:
            batches: scored; their rows, in order, are what the grids' indices mean.
            grids: this rank's micro-batches.
            num_tokens: completion tokens of the step, over all ranks.
            step: from 0; decides the learning rate.
        """
        config = self._config
        learning_rate = learning_rate_at(step, config.run.steps, config.learner)
        return train_step(self._engine, _build(batches, grids), config.objective, num_tokens, learning_rate)

    def measure_gradient(
        self, batches: Sequence[pa.RecordBatch], grids: Sequence[Grid], num_tokens: int, divergence: Divergence
    ) -> dict[str, Metric]:
        """Return the figures of a step of the given divergence, gradient norm included, without taking it."""
        objective = msgspec.structs.replace(self._config.objective, divergence=divergence)
        return measure_gradient(self._engine, _build(batches, grids), objective, num_tokens)

    def student_logprobs(self, batch: pa.RecordBatch) -> Floats:
        """Return the current student's log-probability of every completion token, in the batch's row order.

        Every rank computes all of it: under ZeRO-3 a forward needs them all.
        """
        if stage_of(batch) == "generated":
            batch = add_scores(batch, [TeacherScores(row) for row in _rows(batch, "rollout_logprobs")])
        lengths = ragged(batch, "token_ids").lengths.tolist()
        plan = plan_step(lengths, num_ranks=1, micro_batch_tokens=self._config.learner.micro_batch_tokens)
        completion_lengths = ragged(batch, "rollout_logprobs").lengths
        rows: dict[int, Floats] = {}
        for grid, micro_batch in zip(plan.ranks[0], _build([batch], plan.ranks[0]), strict=True):
            with torch.no_grad():
                logprobs = self._engine.forward(micro_batch).logprobs.cpu().numpy()
            order = [index for grid_row in grid for index in grid_row]
            ends = np.cumsum([completion_lengths[index] for index in order])
            rows |= dict(zip(order, np.split(logprobs, ends[:-1]), strict=False))
        return np.concatenate([np.empty(0, np.float32), *(rows[index] for index in range(len(lengths)))])

    def publish_weights(self, rollout_workers: Sequence[ActorHandle], policy_version: int) -> WeightSyncReport:
        """Bring the current weights to the rollout workers; rank 0's report is the group's."""
        return self._sender.publish(rollout_workers, policy_version)

    def save_shards(self, partial: Path) -> None:
        """Write this rank's part of a checkpoint."""
        self._engine.save(partial)

    def commit_checkpoint(self, folder: Path, partial: Path, state: Mapping[str, Any]) -> None:
        """Complete a checkpoint whose shards are all written; called on rank 0 alone."""
        checkpoint.write_state(partial, state)
        checkpoint.commit(folder)

    def load_shards(self, folder: Path) -> None:
        """Restore this rank's part of a checkpoint."""
        self._engine.load(folder)

    def export(self, folder: Path) -> None:
        """Write the student as a Hugging Face directory."""
        student = self._config.student
        checkpoint.export(self._engine, load_tokenizer(student.model, student.trust_remote_code), folder)


def start_worker(config: Config, rank: int, world_size: int, address: str) -> LearnerWorker:
    """Load the student, join the group at `tcp://host:port`, and return this rank's worker.

    Raises:
        ConfigError: this machine cannot train in the dtype asked for.
        ModelError: the student is missing or cannot be trained.
    """
    if not torch.cuda.is_available():
        if config.learner.dtype == "float16":
            raise ConfigError("learner.dtype = 'float16': DeepSpeed trains it on GPUs only; use bfloat16 or float32")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out by itself
    from learner.zero_engine import ZeroEngine  # picks its accelerator as it is imported

    transformers.utils.logging.disable_progress_bar()
    student = load_student(config.student, config.learner)
    return LearnerWorker(config, ZeroEngine(student, config.learner, rank, world_size, address))


def _make_sender(config: Config, engine: TrainEngine) -> WeightSender:
    dtype, timeout_seconds = config.rollout.engine.dtype, config.ray.call_timeout_seconds
    backend = config.weight_sync.backend
    if backend == "object_store":
        return ObjectStoreSender(engine, dtype, config.weight_sync.bucket_bytes, timeout_seconds)
    from learner.vllm_weight_sender import VllmSender  # imports vllm, which the other backend does not need

    return VllmSender(engine, backend, dtype, config.rollout.engine.tensor_parallel, timeout_seconds)


def _build(batches: Sequence[pa.RecordBatch], grids: Sequence[Grid]) -> list[MicroBatch]:
    rows = trajectories(batches)
    top_k = top_k_of(batches[0]) if batches else 0
    return [build_micro_batch(grid, rows, top_k) for grid in grids]


def _rows(batch: pa.RecordBatch, name: str) -> list[Floats]:
    column = ragged(batch, name)
    return [column[row] for row in range(len(column))]
