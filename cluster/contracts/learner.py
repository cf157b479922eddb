"""The sections of a run file that say how the student learns and how its new weights travel."""

from typing import Annotated, Literal

from msgspec import Meta

from cluster.contracts.pools import GpuFraction
from cluster.contracts.section import Count, CountOrZero, Fraction, Items, NonNegative, Positive, Section

Attention = Literal["auto", "flash", "varlen", "grouped", "masked"]
HeadDtype = Literal["float32", "bfloat16"]
Decay = Annotated[float, Meta(ge=0, lt=1)]  # of a moving average; one of 1 would never move


class LearnerConfig(Section):
    """The DeepSpeed ZeRO group that trains the student."""

    num_workers: Items = 1
    zero_stage: Literal[0, 1, 2, 3] = 2  # 0: one rank of plain torch, without DeepSpeed
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # sums of a step's gradients leave float16's range
    micro_batch_tokens: Count = 8192  # prompt and completion tokens per forward and rank
    gradient_checkpointing: bool = False
    # How packed trajectories are kept apart: flash-attn's kernel, torch's own, torch's plain attention by groups of
    # similar length, or a mask; auto: the first that works on CUDA, a mask on CPU.
    attention: Attention = "auto"
    head_dtype: HeadDtype | None = None  # of the logits; None: float32 on CUDA, where it costs nothing, else `dtype`
    learning_rate: Positive = 1e-6
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: CountOrZero = 0
    min_learning_rate_ratio: Fraction = 0.1  # final rate / peak rate of a decaying schedule
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    epsilon: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    max_gradient_norm: Positive = 1.0
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_parameters: Literal["none", "cpu"] = "none"  # ZeRO stage 3
    gpu_memory_fraction: GpuFraction = 0.4  # kept free for it on a shared GPU
    cpu_threads: Count | None = None  # on CPU; None: this worker's share of the node's cores

    def __post_init__(self) -> None:
        """Check what cannot go together; raises ValueError, which the reader turns into a ConfigError."""
        if self.offload_parameters == "cpu" and self.zero_stage != 3:
            raise ValueError(
                f"learner.offload_parameters = 'cpu' needs learner.zero_stage = 3, found {self.zero_stage}"
            )
        if self.head_dtype == "bfloat16" and self.dtype == "float32":
            raise ValueError("learner.head_dtype = 'bfloat16' needs learner.dtype = 'bfloat16', found 'float32'")
        if self.zero_stage == 1 and self.dtype == "bfloat16":
            # DeepSpeed's optimizer of this combination cannot scale gradients by a step's tokens when all are in.
            raise ValueError("learner.zero_stage = 1 does not work with learner.dtype = 'bfloat16'; use stage 2 or 3")
        if self.zero_stage == 0 and (
            self.num_workers > 1 or "cpu" in (self.offload_optimizer, self.offload_parameters)
        ):
            raise ValueError(
                "learner.zero_stage = 0 is one rank that offloads nothing; set stage 2 or 3 for more than that"
            )


class WeightSyncConfig(Section):
    """How new student weights reach the rollout workers after each step."""

    backend: Literal["auto", "object_store", "nccl", "ipc"] = "auto"  # auto: nccl on own GPUs, ipc on a shared one
    mode: Literal["full", "delta"] = "full"  # delta: values that changed; a copy of the weights at both ends
    bucket_bytes: Count = 1 << 28

    def __post_init__(self) -> None:
        """Check that the backend can do what is asked; raises ValueError, which the reader turns into a ConfigError."""
        if self.mode == "delta" and self.backend not in ("auto", "object_store"):
            raise ValueError(f'mode = "delta" needs backend = "object_store", found "{self.backend}"')
