"""The sections of a run file that say what the rollout and the teacher pools are."""

from typing import Annotated, Literal

from msgspec import Meta

from cluster.contracts.balance import check_limits
from cluster.contracts.section import Count, CountOrZero, Items, Positive, Section, Text

Dtype = Literal["float32", "bfloat16", "float16"]
GpuFraction = Annotated[float, Meta(gt=0, le=1)]  # of one GPU's memory
MAX_TEMPERATURE = 2.0  # vLLM takes no higher one
MIN_TEMPERATURE = 0.01  # vLLM raises lower ones to it, and the importance ratio would divide by another distribution


class EngineConfig(Section):
    """How one vLLM engine is built; the same for rollout workers and teachers."""

    dtype: Dtype = "bfloat16"
    tensor_parallel: Count = 1
    max_concurrent_sequences: Count = 256
    max_batched_tokens: Count = 8192
    gpu_memory_fraction: GpuFraction | None = None  # None: 0.9; on a shared GPU an equal part of what is left
    kv_cache_gib: Positive = 1.0  # on CPU and on a shared GPU; on a GPU of its own the memory fraction decides
    cpu_threads: Count | None = None  # on CPU; None: this worker's share of the node's cores
    enforce_eager: bool | None = None  # None: compile on GPU; on CPU it takes longer than a short run gains
    quantization: str | None = None  # teachers only; as vLLM names it, for example "fp8_per_tensor"
    sleep: bool = False  # rollout engines on a GPU: give its memory back whenever nothing is asked of them


class RolloutConfig(Section):
    """The student's generators."""

    num_workers: Items = 1
    min_workers: Items = 1  # the balancer's limits of num_workers
    max_workers: Items | None = None  # None: what the other pools can spare
    samples_per_prompt: Items = 1
    max_completion_tokens: Count = 512
    temperature: Annotated[float, Meta(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: CountOrZero = 0  # 0: whole vocabulary
    stop: tuple[Text, ...] = ()
    stop_repetition: CountOrZero = 0  # longest passage whose repetition ends a completion, in tokens; 0: none does
    rows_per_batch: Items = 8  # trajectories per Arrow batch sent on as they finish
    max_staleness: CountOrZero = 0  # optimizer steps that generation may run ahead; 0: strictly on-policy
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        """Check the balancer's limits; raises ValueError, which the reader turns into a ConfigError."""
        check_limits(self.num_workers, self.min_workers, self.max_workers)


class TeacherConfig(Section):
    """One teacher and its pool of scorers."""

    model: Text
    trust_remote_code: bool = False
    num_workers: Annotated[int, Meta(ge=0, le=1_000_000)] = 1  # 0: its rows wait until `preceptor scale` adds some
    # Teachers that name the same slot share its workers, which reserve their GPUs once, and score in turns.
    slot: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\Z")] | None = None
    min_workers: Items = 1  # the balancer's limits of num_workers
    max_workers: Items | None = None  # None: what the other pools can spare
    base: str | None = None  # NAME of the [teachers.NAME] that this one was trained from; for targets with "base"
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        """Check the balancer's limits; raises ValueError, which the reader turns into a ConfigError."""
        if self.num_workers:
            check_limits(self.num_workers, self.min_workers, self.max_workers)
