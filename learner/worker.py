"""One rank of the learner: scored trajectories in, new weights out. It knows nothing of how it is deployed."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
import transformers
from ray.actor import ActorHandle

from cluster.config.objective import ObjectiveConfig
from cluster.config.run_config import Config
from cluster.contracts.metrics import Max, Metric, Sum
from cluster.contracts.trajectory import Floats, ragged
from cluster.contracts.wire import from_wire
from cluster.models.model_files import load_tokenizer
from cluster.weight_sync.manifest import WeightSyncReport
from learner.batching.arrivals import RankShare
from learner.batching.micro_batch import MicroBatch, build_micro_batch, trajectories
from learner.batching.plan import Grid, plan_step
from learner.checkpointing import checkpoint
from learner.checkpointing.manifest import WrittenShard, shard_name
from learner.checkpointing.shards import ShardWriter, random_state, read_shard, set_random_state, split_random_state
from learner.engines.base import TrainEngine
from learner.engines.torch import ReferenceEngine
from learner.loss.kernels.choice import choose_kernels
from learner.loss.objective import Objective
from learner.model.completion_head import TeacherHeads, load_teacher_heads
from learner.model.student import load_student
from learner.rendezvous import free_address
from learner.train_step import StepTask, accumulate, learning_rate_at
from learner.weight_sync.object_store import ObjectStoreSender, WeightSender


@dataclass(frozen=True)
class RankRows:
    """Trajectories that one rank computes, and in which micro-batches."""

    batches: Sequence[pa.RecordBatch]  # scored
    task_advantages: Sequence[float]  # of the batches' rows, in order
    grids: Sequence[Grid]  # indices count the batches' rows


class LearnerWorker:
    """Trains the student as one rank of its group; every method is collective unless it says otherwise.

    Args:
        config: the whole run.
        engine: holds the weights of this rank.
        teacher_heads: for objectives over the whole vocabulary.
    """

    def __init__(self, config: Config, engine: TrainEngine, teacher_heads: TeacherHeads) -> None:
        self._config = config
        self._engine = engine
        self._teacher_heads = teacher_heads
        self._kernels = choose_kernels(_device(), config.objective.support)
        self._objective = Objective(config.objective, self._kernels)
        self._sender = _make_sender(config, engine)
        self._writer = ShardWriter()

    def read_teacher_heads(self, config: Config) -> None:
        """Read the LM heads of a configuration's teachers in place of those before; not collective.

        Raises:
            ModelError: a head cannot be read.
        """
        self._teacher_heads = {}  # two sets of heads may be more than there is memory for
        self._teacher_heads = load_teacher_heads(config, _device())

    def accumulate(
        self, rows: RankRows, completes_step: bool, objective: ObjectiveConfig | None = None
    ) -> dict[str, Metric]:
        """Add the gradients of this rank's share of a round.

        Args:
            rows: the trajectories and their micro-batches.
            completes_step: whether no round of the step follows.
            objective: another one than the run's, of the same support.
        """
        task = StepTask(
            self._objective if objective is None else Objective(objective, self._kernels), self._teacher_heads
        )
        return accumulate(self._engine, self._build(rows), task, completes_step)

    def take_step(self, num_tokens: int, step: int) -> dict[str, Metric]:
        """Update the weights with the gradients of optimizer step `step`, from 0, which decides the learning rate."""
        learning_rate = learning_rate_at(step, self._config.run.steps, self._config.learner)
        started = perf_counter()
        gradient_norm = self._engine.step(learning_rate, num_tokens)
        return {
            "gradient_norm": Max(gradient_norm),
            "learning_rate": Max(learning_rate),
            "busy_seconds": Sum(perf_counter() - started),
        }

    def discard_step(self, num_tokens: int) -> dict[str, Metric]:
        """Measure the gradients and clear them."""
        return {"gradient_norm": Max(self._engine.discard(num_tokens))}

    def student_logprobs(self, batch: pa.RecordBatch) -> Floats:
        """Return the current student's log-probability of every completion token, in the batch's row order.

        Every rank computes all of it: under ZeRO-3 a forward needs them all.
        """
        lengths = ragged(batch, "token_ids").lengths.tolist()
        plan = plan_step(lengths, num_ranks=1, micro_batch_tokens=self._config.learner.micro_batch_tokens)
        completion_lengths = ragged(batch, "rollout_logprobs").lengths
        found: dict[int, Floats] = {}
        rows = trajectories([batch])
        for grid in plan.ranks[0]:
            with torch.no_grad():
                micro_batch = build_micro_batch(grid, rows, self._config.run.seed)
                logprobs = self._engine.forward(micro_batch).logprobs.cpu().numpy()
            order = [index for grid_row in grid for index in grid_row]
            ends = np.cumsum([completion_lengths[index] for index in order])
            found |= dict(zip(order, np.split(logprobs, ends[:-1]), strict=False))
        return np.concatenate([np.empty(0, np.float32), *(found[index] for index in range(len(lengths)))])

    def publish_weights(self, rollout_workers: Sequence[ActorHandle], policy_version: int) -> WeightSyncReport:
        """Bring the current weights to the rollout workers; rank 0's report is the group's."""
        return self._sender.publish(rollout_workers, policy_version)

    def begin_shard(self, partial: Path) -> float:
        """Copy this rank's state, begin to write the copy, and return for how many seconds training was held up."""
        started = perf_counter()
        state = self._engine.snapshot() | random_state()
        self._writer.begin(partial / shard_name(self._engine.rank), state)
        return perf_counter() - started

    def shard_is_written(self) -> bool:
        """Return whether `finish_shard` would not wait; not collective."""
        return self._writer.is_done

    def finish_shard(self) -> WrittenShard:
        """Wait for the file that `begin_shard` began; not collective.

        Raises:
            CheckpointError: the disk is full or the place cannot be written to.
        """
        return self._writer.finish()

    def load_shard(self, folder: Path) -> None:
        """Restore this rank's part of a checkpoint.

        Raises:
            CheckpointError: the file cannot be read, or is of another model.
        """
        generators, state = split_random_state(read_shard(folder / shard_name(self._engine.rank)))
        self._engine.restore(state)
        set_random_state(generators)

    def export(self, folder: Path) -> None:
        """Write the student as a Hugging Face directory."""
        student = self._config.student
        checkpoint.export(self._engine, load_tokenizer(student.model, student.trust_remote_code), folder)

    def _build(self, rows: RankRows) -> Iterator[MicroBatch]:
        """Lay out one micro-batch after the other, when it is wanted: hidden states are large."""
        found = trajectories(rows.batches, rows.task_advantages)
        return (build_micro_batch(grid, found, self._config.run.seed) for grid in rows.grids)


def start_worker(config: Config, rank: int, world_size: int, address: str) -> LearnerWorker:
    """Load the student, join the group at `tcp://host:port` unless it is of stage 0, and return this rank's worker.

    Raises:
        ModelError: the student is missing or cannot be trained, or a teacher's LM head cannot be read.
    """
    transformers.utils.logging.disable_progress_bar()
    device = _device()
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out by itself
    student = load_student(config.student, config.learner, device)
    teacher_heads = load_teacher_heads(config, device)
    if config.learner.zero_stage == 0:
        return LearnerWorker(config, ReferenceEngine(student, config.learner), teacher_heads)
    from learner.engines.zero import ZeroEngine  # picks its accelerator as it is imported

    return LearnerWorker(config, ZeroEngine(student, config.learner, rank, world_size, address), teacher_heads)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _make_sender(config: Config, engine: TrainEngine) -> WeightSender:
    dtype, timeout_seconds = config.rollout.engine.dtype, config.ray.call_timeout_seconds
    backend = config.weight_sync.backend
    if backend in ("object_store", "auto"):  # auto: nobody has looked at the GPUs; this way is always open
        return ObjectStoreSender(engine, config.weight_sync, dtype, timeout_seconds)
    from learner.weight_sync.gpu_sender import VllmSender, ipc_link, nccl_link  # vllm, which the other does not need

    to_own_gpus = nccl_link(engine, config.rollout.engine.tensor_parallel, config.weight_sync.bucket_bytes)
    make_link = to_own_gpus if backend == "nccl" else ipc_link
    return VllmSender(engine, config.weight_sync, dtype, timeout_seconds, make_link)


class LearnerActor:
    """A LearnerWorker behind Ray: fetches what references point to, and passes everything else on."""

    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        self._config = config
        self._rank, self._world_size = rank, world_size
        self._worker: LearnerWorker

    def address(self) -> str:
        """Return where the group meets; asked of rank 0."""
        return free_address()

    def start(self, address: str) -> None:
        """Load the student and join the group."""
        self._worker = start_worker(self._config, self._rank, self._world_size, address)

    def read_teacher_heads(self, config: Config) -> None:
        """Read the LM heads of a configuration's teachers in place of those before."""
        self._worker.read_teacher_heads(config)

    def accumulate(
        self, share: RankShare, completes_step: bool, objective: ObjectiveConfig | None
    ) -> dict[str, Metric]:
        """Add the gradients of this rank's share of a round."""
        wires = ray.get(list(share.references), timeout=self._config.ray.call_timeout_seconds)
        batches = [from_wire(wire, stage="scored") for wire in wires]
        return self._worker.accumulate(RankRows(batches, share.task_advantages, share.grids), completes_step, objective)

    def take_step(self, num_tokens: int, step: int) -> dict[str, Metric]:
        """Update the weights with the gradients added up."""
        return self._worker.take_step(num_tokens, step)

    def discard_step(self, num_tokens: int) -> dict[str, Metric]:
        """Measure the gradients added up and clear them."""
        return self._worker.discard_step(num_tokens)

    def student_logprobs(self, references: Sequence[Any]) -> Floats | None:
        """Return the log-probabilities of one batch on rank 0, and nothing on the others."""
        (wire,) = ray.get(list(references), timeout=self._config.ray.call_timeout_seconds)
        logprobs = self._worker.student_logprobs(from_wire(wire))
        return logprobs if self._rank == 0 else None

    def publish_weights(self, rollout_workers: Sequence[ActorHandle], policy_version: int) -> WeightSyncReport:
        """Bring the weights to the rollout workers."""
        return self._worker.publish_weights(rollout_workers, policy_version)

    def begin_shard(self, partial: Path) -> float:
        """Begin to write this rank's part of a checkpoint."""
        return self._worker.begin_shard(partial)

    def shard_is_written(self) -> bool:
        """Return whether it is written."""
        return self._worker.shard_is_written()

    def finish_shard(self) -> WrittenShard:
        """Wait until it is written."""
        return self._worker.finish_shard()

    def load_shard(self, folder: Path) -> None:
        """Restore this rank's part of a checkpoint."""
        self._worker.load_shard(folder)

    def export(self, folder: Path) -> None:
        """Write the student as a Hugging Face directory."""
        self._worker.export(folder)

    def shutdown(self) -> None:
        """End nothing: a rank starts no process of its own."""
