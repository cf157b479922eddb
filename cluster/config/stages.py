"""Defines the sections of a run file for the pools, the learner and what goes between them."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from msgspec import Meta, field
from msgspec.structs import force_setattr, replace

from cluster.config.context import ContextConfig, GentlenessConfig, PrivilegedConfig
from cluster.config.fields import Count, CountOrZero, Fraction, Items, NonNegative, Positive, Section, Text
from cluster.config.replay import ReplayConfig


class BalanceConfig(Section, frozen=True):
    """Sets whether workers move between the rollout pool and the teachers' pools during a run.

    `balance = "auto"` is short for a table with this mode.
    """

    mode: Literal["off", "auto"] = "off"
    observe_steps: Items = 4  # steps behind every decision, in which all workers serve
    cooldown_steps: Items = 4  # least steps from one move to the next; doubled by every move that goes back
    min_gain: Annotated[float, Meta(gt=0, lt=1)] = 0.05  # share of a step's seconds that a move must promise


def check_limits(num_workers: int, min_workers: int, max_workers: int | None) -> None:
    """Check that a pool begins within its limits; raises ValueError, which the reader turns into a ConfigError."""
    if num_workers < min_workers:
        raise ValueError(f"num_workers = {num_workers} is less than min_workers = {min_workers}; raise or lower one")
    if max_workers is not None and num_workers > max_workers:
        raise ValueError(f"num_workers = {num_workers} is more than max_workers = {max_workers}; raise or lower one")


Dtype = Literal["float32", "bfloat16", "float16"]
GpuFraction = Annotated[float, Meta(gt=0, le=1)]  # of one GPU's memory
MAX_TEMPERATURE = 2.0  # vLLM takes no higher one
ROLLOUT_ENGINES = "rollout"  # the backend of a teacher that scores in the rollout pool's engines
GENERATING = "vllm-generate"  # the backend of a teacher whose engine samples
ALIGNED = "aligned"  # a teacher's tokenizer that is not the student's
MIN_TEMPERATURE = 0.01  # vLLM raises lower ones to it, and the importance ratio would divide by another distribution


CONCURRENT_SEQUENCES = 256  # of an engine


class EngineConfig(Section):
    """Sets how one vLLM engine is built, for rollout workers and teachers."""

    dtype: Dtype = "bfloat16"
    tensor_parallel: CountOrZero = 1  # GPUs of each worker; 0: a teacher whose backend needs none
    # None: 256; for a rollout engine on a GPU of its own, what vLLM takes for that GPU: 1,024 on an H100 or H200
    max_concurrent_sequences: Count | None = None
    max_batched_tokens: Count = 8192
    gpu_memory_fraction: GpuFraction | None = None  # None: what the memory plan gives it, 0.9 at most (docs/gpu.md)
    # On CPU and on a shared GPU; on a GPU of its own the memory fraction decides. None: 1.0 on CPU, else as planned.
    kv_cache_gib: Positive | None = None
    # None: this worker's share of the node's cores; beside a GPU an engine itself has 1
    cpu_threads: Count | None = None
    # None: rollout engines compile on GPU; on CPU it takes longer than a short run gains, and teachers never decode
    enforce_eager: bool | None = None
    quantization: str | None = None  # teachers only; as vLLM names it, for example "fp8_per_tensor"
    sleep: bool = False  # rollout engines on a GPU: give its memory back whenever they have no request
    extra: dict[str, Any] = field(default_factory=dict)  # further arguments of vLLM, by its own names

    @property
    def concurrent_sequences(self) -> int:
        """Return how many sequences run at once where vLLM does not choose."""
        return self.max_concurrent_sequences or CONCURRENT_SEQUENCES


class HorizonConfig(Section, frozen=True):
    """Begins with short completions, and lengthens them while it pays: few are cut off, and their ends still teach."""

    start: Count  # the longest completion at first, in tokens; rollout.max_completion_tokens is the longest ever
    factor: Annotated[float, Meta(gt=1, le=1000)] = 1.5  # by which a step lengthens
    max_truncated: Fraction = 0.2  # of a step's completions cut off: with more, the student has still to learn to end
    # Mean |sampler - teacher log-probability| of the last quarter of completions cut off, in that of all tokens: with
    # less, nothing is learned from longer ones.
    min_tail: NonNegative = 0.5


class RolloutConfig(Section):
    """The student's generators."""

    num_workers: Annotated[int, Meta(ge=0, le=1_000_000)] = 1  # 0: all rows are replayed
    min_workers: Items = 1  # the balancer's limits of num_workers
    max_workers: Items | None = None  # None: what the other pools can spare
    samples_per_prompt: Items = 1
    max_completion_tokens: Count = 512
    temperature: Annotated[float, Meta(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: CountOrZero = 0  # 0: whole vocabulary
    horizon: HorizonConfig | None = None  # lengthens completions during the run; None: all may have the longest
    stop: tuple[Text, ...] = ()
    stop_token_ids: tuple[CountOrZero, ...] = ()  # end a completion too; the ids that end the teachers' turns are added
    # Ids that count as one token, the first for all. None: all that end a completion on either side; []: each by itself
    stop_class: tuple[CountOrZero, ...] | None = None
    stop_repetition: CountOrZero = 0  # longest passage whose repetition ends a completion, in tokens; 0: none does
    rows_per_batch: Items = 8  # trajectories per Arrow batch sent on as they finish; more while the driver is behind
    max_staleness: CountOrZero = 0  # optimizer steps that generation may run ahead; 0: strictly on-policy
    # With new weights, completions under way go on with the keys and values of the old ones; false: these are computed
    # anew. New prompts share none of them.
    keep_cache_on_update: bool = False
    privileged: PrivilegedConfig | None = (
        None  # who writes for prompts that the student never solves; None: the student
    )
    record: bool = False  # keep all rows that the run learns from in its directory; docs/rollouts.md
    replay: ReplayConfig | None = None  # learn from rows that another run kept; its directory alone, or a table
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        if self.num_workers:
            check_limits(self.num_workers, self.min_workers, self.max_workers)
        if self.horizon is not None and self.horizon.start > self.max_completion_tokens:
            raise ValueError(
                f"horizon.start = {self.horizon.start} is more than max_completion_tokens = "
                f"{self.max_completion_tokens}; raise or lower one"
            )


class RefreshConfig(Section):
    """Sets when, and how, a teacher that is the student takes the student's weights; one of the first three is set."""

    every: Count | None = None  # optimizer steps from one time to the next
    ema: Annotated[float, Meta(gt=0, le=1)] | None = None  # after every step: weights += ema * (student's - weights)
    # A held-out metric such as "held_out/accuracy": when it is better than ever before, after an evaluation.
    gate: Annotated[str, Meta(pattern=r"^held_out/.")] | None = None
    better: Literal["higher", "lower"] = "higher"  # of the gate's metric

    def __post_init__(self) -> None:
        given = [name for name in ("every", "ema", "gate") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"sets {' and '.join(given) or 'nothing'}; set one of every, ema and gate")
        if self.better == "lower" and self.gate is None:
            raise ValueError("better = 'lower' is for a gate's metric; set gate, or remove it")


class AlignmentConfig(Section):
    """Says what an aligned teacher's tokens are aligned with; the run sets it."""

    student: Text  # the model whose tokenizer the completions are written with
    trust_remote_code: bool = False
    stop_ids: tuple[CountOrZero, ...] = ()  # that end the student's turns
    digest: str = ""  # of the map from the student's tokens to the teacher's


class StatesConfig(Section):
    """Says which layers' hidden states a teacher sends; the run takes it from the objective and the student's files."""

    layers: tuple[Count, ...]  # of the student, from 1
    student_depth: Count  # layers that the student has; those of a teacher of another depth are paired with them
    bank: Text | None = None  # file that projects the states; None: they travel as they are
    digest: str = ""  # of that bank, as the driver has it: it must be the same on every node


class TeacherConfig(Section):
    """One teacher and its pool of scorers."""

    # Hugging Face directory or hub id; with `url`, the name that the servers have for it; with `from`, the student's.
    model: Text
    source: Literal["student"] | None = field(default=None, name="from")  # "student": the teacher is the student itself
    # When it takes the student's weights; frozen: never; live: after every step.
    refresh: Literal["frozen", "live"] | RefreshConfig = "frozen"
    backend: Text = "vllm"  # what scores: a name of teacher_workers/backends/base.py, or package.module:Class
    signals: tuple[Text, ...] = ()  # more of what it says of each token, beside what the objective needs: import paths
    trust_remote_code: bool = False
    num_workers: Annotated[int, Meta(ge=0, le=1_000_000)] = 1  # 0: its rows wait until `preceptor scale` adds some
    # Teachers that name the same slot share its workers, which reserve their GPUs once, and score in turns.
    slot: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\Z")] | None = None
    min_workers: Items = 1  # the balancer's limits of num_workers
    max_workers: Items | None = None  # None: what the other pools can spare
    # What may differ from the student, which is refused otherwise: the EOS that ends a turn; names of added tokens, and
    # ordinary tokens that one side has alone.
    accept_differences: tuple[Literal["eos", "tokens"], ...] = ()
    excluded_token_ids: tuple[CountOrZero, ...] = ()  # have no probability; tokens that only the teacher has are added
    stop_class: tuple[CountOrZero, ...] = ()  # the run's, and the ids that end this teacher's turns; the run sets it
    context: ContextConfig | None = None  # what it reads in the place of the student's prompt; None: the same
    shuffled_context: bool = False  # the control of `context`: that of another prompt
    # Multiplies each reward by how gentle the text is to this teacher, to train a sampler for it; None: leaves it
    gentleness: GentlenessConfig | None = None
    base: str | None = None  # NAME of the [teachers.NAME] that this one was trained from; for targets with "base"
    # Servers with prompt log-probabilities, which divide the rows: "http://host:8000/v1". The workers need no GPU; of
    # `engine` count `max_concurrent_sequences`, the requests in flight per worker, and `dtype`, that of the servers.
    url: Text | tuple[Text, ...] | None = None
    api_key_env: Text | None = None  # name of the environment variable that holds the servers' key
    # With a url: of the servers' model, to compare with the student's; None: taken to be the same. Without: "same", or
    # "aligned", a tokenizer of its own whose tokens are aligned with the student's.
    tokenizer: Text | None = None
    min_coverage: Fraction = 0.5  # aligned: least share of the student's tokens that are tokens of the teacher's text
    alignment: AlignmentConfig | None = None  # aligned: what with; the run sets it
    request_timeout_seconds: Positive = 120.0
    retry_seconds: NonNegative = 600.0  # of failures that may pass: server away or busy, error 5xx, no answer in time
    states: StatesConfig | None = None  # what of its layers it sends; the run sets it
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        if self.num_workers:
            check_limits(self.num_workers, self.min_workers, self.max_workers)
        if self.url is None:
            self._check_without_url()
            return
        if self.tokenizer == ALIGNED:
            raise ValueError("tokenizer = 'aligned' needs the teacher's own files, found a url")
        if not self.urls:
            raise ValueError("url = [] names no server")
        for url in self.urls:
            _check_url(url)
        if self.backend == "vllm":
            force_setattr(self, "backend", "http")
        force_setattr(self, "engine", replace(self.engine, tensor_parallel=0))

    @property
    def is_refreshed(self) -> bool:
        """Return whether its weights change while a run goes on."""
        return self.refresh != "frozen"

    @property
    def receives_weights(self) -> bool:
        """Return whether its own workers are sent weights while a run goes on."""
        return self.is_refreshed and self.backend != ROLLOUT_ENGINES

    def version_due(self, step: int) -> int | None:
        """Return how many optimizer steps are behind its weights after so many of the run; None: its gate decides.

        Example:
            >>> every = TeacherConfig("student", source="student", refresh=RefreshConfig(every=4))
            >>> [every.version_due(step) for step in (0, 3, 4, 9)]
            [0, 0, 4, 8]
        """
        if not isinstance(self.refresh, RefreshConfig):
            return step if self.refresh == "live" else 0
        if self.refresh.gate is not None:
            return None
        return step - step % (self.refresh.every or 1)

    @property
    def is_aligned(self) -> bool:
        """Return whether the teacher has a tokenizer of its own, whose tokens are aligned with the student's."""
        return self.tokenizer == ALIGNED

    @property
    def urls(self) -> tuple[str, ...]:
        """Return the URLs of the servers, without a slash at the end."""
        urls = (self.url,) if isinstance(self.url, str) else self.url or ()
        return tuple(url.rstrip("/") for url in urls)

    def _check_without_url(self) -> None:
        if self.backend == "http":
            raise ValueError("backend = 'http' needs a url")
        if self.backend == ROLLOUT_ENGINES:
            self._check_in_rollout_engines()
            force_setattr(self, "engine", replace(self.engine, tensor_parallel=0))
        if self.api_key_env is not None:
            raise ValueError("api_key_env is for teachers with a url; set url, or remove it")
        if self.tokenizer not in (None, "same", ALIGNED):
            raise ValueError(
                f"tokenizer is '{self.tokenizer}'; expected 'same' or 'aligned', or a url, whose servers' it is"
            )

    def _check_in_rollout_engines(self) -> None:
        if (self.source, self.refresh) != ("student", "live"):
            raise ValueError(
                f"backend = '{ROLLOUT_ENGINES}' scores with the weights that the student writes with; set from = "
                "'student' and refresh = 'live', or another backend"
            )
        if self.excluded_token_ids or self.slot is not None:
            raise ValueError(f"backend = '{ROLLOUT_ENGINES}' excludes no tokens and has no slot; remove them")


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url is '{url}'; expected http:// or https://, a host and a path: http://host:8000/v1")
    if parts.username is not None:
        raise ValueError(
            "url holds a user name or password, which would be written to files; put a key into an environment "
            "variable and name it in api_key_env"
        )


USUAL_MICRO_BATCH_TOKENS = 8192
Attention = Literal["auto", "flash", "varlen", "grouped", "masked"]
HeadDtype = Literal["float32", "bfloat16"]
Decay = Annotated[float, Meta(ge=0, lt=1)]  # of a moving average; one of 1 would never move


class LearnerConfig(Section):
    """The DeepSpeed ZeRO group that trains the student."""

    num_workers: Items = 1
    zero_stage: Literal[0, 1, 2, 3] = 2  # 0: one rank of plain torch, without DeepSpeed
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # sums of a step's gradients leave float16's range
    # Prompt and completion tokens per forward and rank; None: what the memory plan gives it on a GPU, else 8192.
    micro_batch_tokens: Count | None = None
    gradient_checkpointing: bool | None = None  # None: on a GPU that would not hold the activations
    compile: bool = False  # decoder layers, by torch.compile; not with stage 3, whose hooks gather parameters inside
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
    gpu_memory_fraction: GpuFraction | None = None  # kept free for it on a shared GPU; None: what it needs
    cpu_threads: Count | None = None  # None: this worker's share of the node's cores
    deepspeed: dict[str, Any] = field(default_factory=dict)  # further entries of DeepSpeed's configuration

    def __post_init__(self) -> None:
        if self.deepspeed and self.zero_stage == 0:
            raise ValueError(
                "learner.deepspeed is set, but learner.zero_stage = 0 uses no DeepSpeed; set another stage"
            )
        if self.offload_parameters == "cpu" and self.zero_stage != 3:
            raise ValueError(
                f"learner.offload_parameters = 'cpu' needs learner.zero_stage = 3, found {self.zero_stage}"
            )
        if self.head_dtype == "bfloat16" and self.dtype == "float32":
            raise ValueError("learner.head_dtype = 'bfloat16' needs learner.dtype = 'bfloat16', found 'float32'")
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "learner.compile = true does not work with learner.zero_stage = 3, which gathers parameters inside a "
                "layer; use another stage"
            )
        if self.zero_stage == 0 and (
            self.num_workers > 1 or "cpu" in (self.offload_optimizer, self.offload_parameters)
        ):
            raise ValueError(
                "learner.zero_stage = 0 is one rank that offloads nothing; set stage 2 or 3 for more than that"
            )

    @property
    def forward_tokens(self) -> int:
        """Return the most tokens of a micro-batch."""
        return self.micro_batch_tokens or USUAL_MICRO_BATCH_TOKENS

    @property
    def recomputes(self) -> bool:
        """Return whether each layer's activations are computed again in the backward pass."""
        return bool(self.gradient_checkpointing)


class WeightSyncConfig(Section):
    """Says how new student weights reach the rollout workers after each step."""

    # A name of PAYLOADS, or package.module:Class; "delta" sends the values that changed, and keeps a copy at both ends.
    payload: Text = "full"
    transport: Literal["auto", "object_store", "nccl", "ipc"] = "auto"  # auto: nccl on own GPUs, ipc on a shared one
    bucket_bytes: Count = 1 << 28
