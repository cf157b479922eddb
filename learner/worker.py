"""Runs one rank of the learner: scored trajectories in, new weights out."""

import os
import resource
from collections.abc import Callable, Iterable, Sequence
from functools import partial
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
from cluster.contracts.errors import PlacementError
from cluster.contracts.import_path import load_object
from cluster.contracts.kept_rows import Taken
from cluster.contracts.metrics import Max, Mean, Metric, Sum, merge
from cluster.contracts.trajectory import Floats, ragged
from cluster.contracts.wire import from_wire
from cluster.models.hidden_layers import load_bank
from cluster.models.model_checks import ignored_ids
from cluster.weight_sync.manifest import WeightSyncReport
from cluster.weight_sync.transports import TRANSPORTS, choose
from learner.batching.arrivals import RankShare
from learner.batching.early_stop import end_early
from learner.batching.micro_batch import MicroBatch, Trajectory, build_micro_batch, trajectories
from learner.batching.plan import plan_step
from learner.checkpointing.export import export
from learner.checkpointing.manifest import WrittenShard, shard_name
from learner.checkpointing.shards import ShardWriter, random_state, read_shard, set_random_state, split_random_state
from learner.engines.base import TrainEngine
from learner.engines.torch import ReferenceEngine
from learner.kept_rows import KeptRows
from learner.loss.kernels.choice import choose_kernels
from learner.loss.objective import Objective
from learner.model.completion_head import TeacherHeads, load_teacher_heads, with_updated_head
from learner.model.student import load_student
from learner.rendezvous import free_address
from learner.self_teachers import SelfTeachers
from learner.train_step import accumulate, learning_rate_at, prefetched
from learner.weight_sync.object_store import WeightSender


class LearnerActor:
    """Trains the student as one rank of its group; an ordinary object, which a LearnerGroup runs as a Ray actor.

    Every method is collective unless it says otherwise. `fetch` returns what references point to; None: Ray does.
    """

    def __init__(
        self,
        config: Config,
        rank: int = 0,
        world_size: int = 1,
        fetch: Callable[[Sequence[Any]], list[Any]] | None = None,
    ) -> None:
        self._config, self._rank, self._world_size = config, rank, world_size
        self._fetch = fetch or self._fetch_from_ray
        self._writer, self._kept = ShardWriter(), KeptRows(config)

    def address(self) -> str:
        """Return where the group can meet: rank 0's answer counts; not collective."""
        return free_address()

    def start(self, address: str) -> None:
        """Load the student, and join the group at `tcp://host:port` unless it is of stage 0."""
        config, device = self._config, _device()
        check_gpu(ray.get_gpu_ids() if ray.is_initialized() else [], device)
        transformers.utils.logging.disable_progress_bar()
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out by itself
        # Under stage 3 rank 0's weights are everybody's: no other rank has a second copy in its node's memory.
        reads_weights = config.learner.zero_stage < 3 or self._rank == 0
        student = load_student(config.student, config.learner, device, reads_weights)
        student.head.stop_class = config.rollout.stop_class or ()
        teacher_heads = load_teacher_heads(config, device)
        for states in filter(None, (teacher.states for teacher in config.teachers.values())):
            if states.bank is not None:
                load_bank(states.bank, states.digest)  # the objective reads it again; here, it must be the driver's
        if config.learner.zero_stage == 0:
            self.use(ReferenceEngine(student, config.learner), teacher_heads)
        else:
            from learner.engines.zero import ZeroEngine  # picks its accelerator as it is imported

            self.use(ZeroEngine(student, config.learner, self._rank, self._world_size, address), teacher_heads)

    def use(self, engine: TrainEngine, teacher_heads: TeacherHeads) -> None:
        """Train the engine's weights; the heads are for objectives over the whole vocabulary."""
        self._engine, self._teacher_heads = engine, teacher_heads
        self._kernels = choose_kernels(_device(), self._config.objective.needs.hidden)
        config, rollout = self._config, self._config.rollout
        self._ignored_ids = ignored_ids(config.student, config.objective.token_weights, rollout.stop_token_ids)
        self._objective = Objective(config.objective, self._kernels, rollout.temperature, self._ignored_ids)
        _, transport = choose(self._config, torch.cuda.is_available())
        make_sender = load_object(TRANSPORTS[transport].sender, "weight_sync.transport")
        self._sender: WeightSender = make_sender(engine, self._config)
        self._self_teachers = SelfTeachers(engine, self._config)

    def read_teacher_heads(self, config: Config) -> None:
        """Read the LM heads of a configuration's teachers in place of those before; not collective."""
        self._teacher_heads = {}  # two sets of heads may be more than there is memory for
        self._teacher_heads = load_teacher_heads(config, _device())

    def accumulate(
        self, share: RankShare, completes_step: bool, objective: ObjectiveConfig | None = None
    ) -> dict[str, Metric]:
        """Add the gradients of this rank's share of a round; `objective`, of the same support, replaces the run's."""
        batches, rows, micro_batches = self._read(share)
        minimised = self._objective_of(share, objective)
        keep = None
        if objective is None:
            pairs = zip(micro_batches, share.grids, strict=True)
            micro_batches = (self._kept.watch(batch, grid, rows) for batch, grid in pairs)
            keep = partial(self._kept.add, batches=batches)
        device, count = _device(), len(share.grids)
        moved = (batch.to(device) for batch in micro_batches)  # once: the metrics read the tokens too
        metrics = accumulate(self._engine, moved, count, minimised, self._teacher_heads, completes_step, keep)
        return metrics if objective is not None else metrics | self._left_out(rows, share)

    def _left_out(self, rows: Sequence[Trajectory], share: RankShare) -> dict[str, Metric]:
        """Return which part of the sampled tokens comes after the ends of their trajectories, where these have any."""
        if not self._config.objective.token_weights.stop_window:
            return {}
        placed = [rows[index] for grid in share.grids for grid_row in grid for index in grid_row]
        sampled, learned = sum(row.num_sampled for row in placed), sum(len(row.rollout_logprobs) for row in placed)
        return {"left_out_ratio": Mean(float(sampled - learned), float(sampled))}

    def advantage_sums(self, share: RankShare, objective: ObjectiveConfig | None = None) -> dict[str, Metric]:
        """Return what the current student makes of this rank's share of the mean advantages over a step."""
        started, read = perf_counter(), self._objective_of(share, objective)
        sums: list[dict[str, Metric]] = []
        for batch in self._read(share)[-1]:
            with torch.no_grad():
                result = self._engine.forward(batch)
            if len(batch.tokens):
                sums.append({**read.advantage_sums(batch.tokens.to(result.logprobs.device), result)})
        return merge(sums) | {"busy_seconds": Sum(perf_counter() - started)}

    def take_kept_rows(self) -> Taken:
        """Return, once, this rank's kept rows since they were taken last; not collective."""
        return self._kept.take()

    def _objective_of(self, share: RankShare, objective: ObjectiveConfig | None) -> Objective:
        """Return what is minimised in a round: the run's objective, as it is in the step, or another one."""
        config = objective or self._config.objective.at(share.step)
        if config is self._config.objective and not share.step_means:
            return self._objective
        return Objective(config, self._kernels, self._config.rollout.temperature, self._ignored_ids, share.step_means)

    def _read(self, share: RankShare) -> tuple[list[pa.RecordBatch], list[Trajectory], Iterable[MicroBatch]]:
        """Return a share's batches, their rows, and its micro-batches, one at a time: hidden states are large."""
        batches = [from_wire(wire, stage="scored") for wire in self._fetch(share.references)]
        rows, early = trajectories(batches, share.task_advantages, share.weights), self._config.objective.token_weights
        if early.stop_window:
            rows = end_early(rows, early.stop_window, early.stop_below)
        built = (build_micro_batch(grid, rows, self._config.run.seed) for grid in share.grids)
        return batches, rows, prefetched(built, _device())

    def take_step(self, num_tokens: int, step: int) -> dict[str, Metric]:
        """Update the weights with the gradients of optimizer step `step`, from 0, which decides the learning rate."""
        learning_rate = learning_rate_at(step, self._config.run.steps, self._config.learner)
        started = perf_counter()
        gradient_norm = self._engine.step(learning_rate, num_tokens)
        self._self_teachers.average()
        return {
            "gradient_norm": Max(gradient_norm),
            "learning_rate": Max(learning_rate),
            "peak_memory_gib": Max(_peak_memory_bytes(_device()) / 2**30),
            "busy_seconds": Sum(perf_counter() - started),
        }

    def discard_step(self, num_tokens: int) -> dict[str, Metric]:
        """Measure the gradients and clear them."""
        return {"gradient_norm": Max(self._engine.discard(num_tokens))}

    def student_logprobs(self, references: Sequence[Any]) -> Floats | None:
        """Return the current student's log-probability of every completion token of one batch, its rows in order.

        Rank 0 alone returns them. Every rank computes all of them: under ZeRO-3 a forward needs them all.
        """
        (wire,) = self._fetch(references)
        batch = from_wire(wire)
        lengths = ragged(batch, "token_ids").lengths.tolist()
        (grids,) = plan_step(lengths, num_ranks=1, micro_batch_tokens=self._config.learner.forward_tokens)
        completion_lengths = ragged(batch, "rollout_logprobs").lengths
        of_rows: dict[int, Floats] = {}
        rows = trajectories([batch])
        for grid in grids:
            with torch.no_grad():
                micro_batch = build_micro_batch(grid, rows, self._config.run.seed)
                logprobs = self._engine.forward(micro_batch).logprobs.cpu().numpy()
            order = [index for grid_row in grid for index in grid_row]
            ends = np.cumsum([completion_lengths[index] for index in order])
            of_rows |= dict(zip(order, np.split(logprobs, ends[:-1]), strict=False))
        if self._rank != 0:
            return None
        return np.concatenate([np.empty(0, np.float32), *(of_rows[index] for index in range(len(lengths)))])

    def publish_weights(self, rollout_workers: Sequence[ActorHandle], policy_version: int) -> WeightSyncReport:
        """Bring the current weights to the rollout workers; rank 0's report is the group's."""
        return self._sender.publish(rollout_workers, policy_version)

    def refresh_teacher(
        self, name: str, workers: Sequence[ActorHandle], version: int, takes_weights: bool
    ) -> WeightSyncReport:
        """Bring a teacher's weights to its pool, if it `takes_weights` the student's of now, and read its LM head."""
        if takes_weights:
            self._self_teachers.take(name)
        report = self._self_teachers.publish(name, workers, version)
        self._teacher_heads = with_updated_head(
            self._config, self._teacher_heads, name, lambda head: self._self_teachers.head_of(name, head)
        )
        return report

    def bring_teacher(self, name: str, worker: ActorHandle, version: int) -> None:
        """Bring a teacher's weights to one more worker of its pool."""
        self._self_teachers.publish(name, [worker], version)

    def begin_shard(self, partial: Path) -> float:
        """Copy this rank's state, begin to write the copy, and return for how many seconds training was held up."""
        started = perf_counter()
        state = self._engine.snapshot() | random_state() | self._self_teachers.snapshot()
        self._writer.begin(partial / shard_name(self._engine.rank), state)
        return perf_counter() - started

    def shard_is_written(self) -> bool:
        """Return whether `finish_shard` would not wait; not collective."""
        return self._writer.is_done

    def finish_shard(self) -> WrittenShard:
        """Wait for the file that `begin_shard` began; not collective."""
        return self._writer.finish()

    def load_shard(self, folder: Path) -> None:
        """Restore this rank's part of a checkpoint."""
        generators, state = split_random_state(read_shard(folder / shard_name(self._engine.rank)))
        self._engine.restore(self._self_teachers.restore(state))
        set_random_state(generators)

    def export(self, folder: Path) -> None:
        """Write the student as a Hugging Face directory."""
        export(self._engine, self._config, folder)

    def shutdown(self) -> None:
        """End nothing: a rank starts no process of its own."""

    def _fetch_from_ray(self, references: Sequence[Any]) -> list[Any]:
        return ray.get(list(references), timeout=self._config.ray.call_timeout_seconds)


def check_gpu(gpu_ids: Sequence[Any], device: torch.device) -> None:
    """Raise PlacementError where Ray has given this process GPUs and torch finds none."""
    if gpu_ids and device.type == "cpu":
        raise PlacementError(
            f"learner: Ray gave it GPU {gpu_ids[0]}, but torch {torch.__version__} (CUDA {torch.version.cuda}) finds "
            "none; update the NVIDIA driver to what this CUDA needs, or start Ray with --num-gpus 0 to train on the CPU"
        )


def _peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this rank has had: of its GPU what torch allocated, on a CPU all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
