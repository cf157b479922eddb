"""Trains over DeepSpeed ZeRO stages 1, 2 and 3; no other file imports deepspeed."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    FP32_FLAT_GROUPS,
    OPTIMIZER_STATE_DICT,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfigError
from torch import Tensor

from cluster.config.pass_through import merged
from cluster.config.stages import LearnerConfig
from cluster.contracts.errors import ConfigError
from cluster.placement.memory import LARGE_BUCKET, bucket_values
from learner.batching.micro_batch import MicroBatch
from learner.checkpointing.shards import flatten, host_copy, unflatten
from learner.engines.base import PausableAdamW, adamw_settings, exchange, paused
from learner.loss.objective import Objective
from learner.loss.tokens import Evaluation
from learner.model.completion_head import TeacherHeads
from learner.model.student import Student


class PausableCPUAdam(DeepSpeedCPUAdam):
    """DeepSpeed's AdamW for optimizer state in host memory, which can sit out a step."""

    paused = False

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        return None if self.paused else super().step(closure, **kwargs)


class ZeroEngine:
    """Implements TrainEngine for one rank of a DeepSpeed ZeRO group, which meets at `tcp://host:port` of rank 0.

    The student has the same weights on every rank.
    """

    def __init__(self, student: Student, config: LearnerConfig, rank: int, world_size: int, address: str) -> None:
        self.student = student
        self.rank, self.world_size = rank, world_size
        self._parameters = dict(student.causal_lm.named_parameters())
        self._is_sharded = config.zero_stage == 3
        # Where the state_dict of ZeRO's optimizer has the master weights, and the state of the optimizer inside.
        self._weights_key = FP32_FLAT_GROUPS if self._is_sharded else SINGLE_PARTITION_OF_FP32_GROUPS
        self._optimizer_key = OPTIMIZER_STATE_DICT if self._is_sharded else BASE_OPTIMIZER_STATE
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its warnings doubt the optimizer subclass
        _skip_shared_memory_op()
        deepspeed.init_distributed(
            "nccl" if torch.cuda.is_available() else "gloo",
            auto_mpi_discovery=False,
            init_method=address,
            rank=rank,
            world_size=world_size,
        )
        gpu_bytes = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
        bucket = bucket_values(sum(parameter.numel() for parameter in student.parameters()), gpu_bytes)
        settings = zero_settings(config, world_size, bucket)
        with _refusals(config):
            if self._is_sharded:
                _shard(student, settings)
            self._optimizer = make_optimizer(student, config)
            self._engine, *_ = deepspeed.initialize(
                model=student, optimizer=self._optimizer, config=settings, dist_init_required=False
            )
        # Stage 1 in bfloat16: each rank adds up the whole gradient in float32, and ranks exchange it once a step.
        self._adds_whole_gradients = isinstance(self._engine.optimizer, BF16_Optimizer)

    def forward(
        self, batch: MicroBatch, objective: Objective | None = None, teacher_heads: TeacherHeads | None = None
    ) -> Evaluation:
        return Evaluation(*self._engine(batch.to(self._engine.device), objective, teacher_heads))

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed averages gradients over ranks; the loss is a sum over them.
        self._engine.backward(loss * self.world_size)

    def step(self, learning_rate: float, num_tokens: int) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        # How many tokens a step has is known only when all have been added up. A loss scale is what DeepSpeed divides
        # gradients and their norm by; it would also multiply the losses, so it is 1 while they are added up.
        optimizer, divisor = self._engine.optimizer, float(max(1, num_tokens))
        if self._adds_whole_gradients:  # this optimizer has no loss scale, and all its gradients are in its own buffers
            for gradients in optimizer.fp32_groups_gradients_flat:
                gradients.div_(divisor)
            self._engine.step()
        else:
            optimizer.override_loss_scale(divisor)
            self._engine.step()
            optimizer.override_loss_scale(1.0)
        return float(self._engine.get_global_grad_norm())

    def discard(self, num_tokens: int) -> float:
        with paused(self._optimizer):
            return self.step(0.0, num_tokens)

    @contextmanager
    def full_parameters(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        form = self.student.checkpoint_format
        chosen = {name: self._parameters[name] for name in form.parameters_of(names)}
        with deepspeed.zero.GatheredParameters(list(chosen.values())) if self._is_sharded else nullcontext():
            yield form.convert({name: parameter.detach() for name, parameter in chosen.items()})

    def masters(self) -> list[Tensor]:
        """Return the fp32 weights that this rank's optimizer updates, with the padding of their partition."""
        optimizer = self._engine.optimizer
        if self._is_sharded:
            return list(optimizer.fp32_partitioned_groups_flat)
        if self._adds_whole_gradients:
            return list(optimizer.fp32_groups_flat_partition)
        return list(optimizer.single_partition_of_fp32_groups)

    @contextmanager
    def holding(self, weights: Sequence[Tensor]) -> Iterator[None]:
        exchange(self.masters(), weights)
        self._follow_masters()
        try:
            yield
        finally:
            exchange(self.masters(), weights)
            self._follow_masters()

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy, in host memory, of this rank's master weights and their optimizer state."""
        state = self._engine.optimizer.state_dict()
        return host_copy(flatten(self.masters(), state[self._optimizer_key]["state"]))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a snapshot of a group with the same number of ranks and the same stage.

        What is no tensor in DeepSpeed's own state (loss scaler, slices, settings) stays that of this engine.
        """
        weights, values = unflatten(state, self.masters())
        optimizer = self._engine.optimizer
        if self._adds_whole_gradients:  # its own way back prints to the terminal
            for master, saved in zip(self.masters(), weights, strict=True):
                master.data.copy_(saved)
            self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": values})
            optimizer.update_lp_params()
            return
        own_state = optimizer.state_dict()
        own_state[self._weights_key] = weights
        own_state[self._optimizer_key] = {**own_state[self._optimizer_key], "state": values}
        if self._is_sharded:
            optimizer.checkpoint_event_prologue()
        optimizer.load_state_dict([own_state] * self.world_size, load_from_fp32_weights=True)
        if self._is_sharded:
            optimizer.checkpoint_event_epilogue()
        else:
            optimizer.update_lp_params()  # the weights that compute, from the masters of all ranks

    def _follow_masters(self) -> None:
        """Let the weights that compute be the masters of all ranks, rounded."""
        optimizer = self._engine.optimizer
        if not self._is_sharded:
            optimizer.update_lp_params()
            return
        optimizer.checkpoint_event_prologue()
        for computing, master in zip(optimizer.fp16_partitioned_groups_flat, self.masters(), strict=True):
            computing.data.copy_(master.data)
        optimizer.checkpoint_event_epilogue()


def make_optimizer(student: Student, config: LearnerConfig) -> PausableAdamW | PausableCPUAdam:
    """Return the optimizer for where its state is; offloaded parameters alone leave it, and the masters, on the GPU."""
    settings = adamw_settings(config)
    if config.offload_optimizer == "cpu":
        tools_on_path()  # DeepSpeed compiles this optimizer
        return PausableCPUAdam(student.parameters(), **settings)
    return PausableAdamW(student.parameters(), fused=True, **settings)


def tools_on_path() -> None:
    """Let torch find `ninja`, which lies beside Python in an environment that was not activated."""
    folder, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if folder not in path.split(os.pathsep):
        os.environ["PATH"] = f"{path}{os.pathsep}{folder}"


def zero_settings(config: LearnerConfig, world_size: int, bucket: int = LARGE_BUCKET) -> dict[str, Any]:
    """Return DeepSpeed's own configuration for the learner's section.

    The micro-batch counts are placeholders: batches come already cut, and the engine receives which one is the last.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if config.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters == "cpu":
        zero["offload_param"] = {"device": "cpu"}
    settings = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_gradient_norm,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        # Sums over micro-batches and ranks stay in fp32 whatever the parameters are.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # ours is AdamW with a pause
        "steps_per_print": 1 << 62,
    }
    return merged(settings, config.deepspeed)


@contextmanager
def _refusals(config: LearnerConfig) -> Iterator[None]:
    """Raise ConfigError where DeepSpeed refuses what the run file passes through to it."""
    try:
        yield
    except (DeepSpeedConfigError, ValueError, TypeError, AssertionError) as error:
        if not config.deepspeed:
            raise
        raise ConfigError(f"learner.deepspeed: DeepSpeed refuses it: {error}") from error


def _shard(student: Student, zero: dict[str, Any]) -> None:
    """Leave each rank its part of every parameter, one parameter after the other, and bring the buffers to its device.

    DeepSpeed would bring the whole student to every GPU before it shards it.
    """
    deepspeed.zero.Init(module=student, config_dict_or_path=zero)
    device = deepspeed.accelerator.get_accelerator().current_device_name()
    for buffer in student.buffers():
        buffer.data = buffer.data.to(device)
        deepspeed.comm.broadcast(buffer.data, 0)  # as `Init` does with parameters: only rank 0 has read the files


def _skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce on CPU.

    Only its inference engine calls that op; building it takes a C++ compiler, and longer than a demo's training step.
    On a GPU DeepSpeed has no such op, and reading the list would make it try compilers for all of its CUDA ops.
    """
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
