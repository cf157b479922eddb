"""Defines the sections of a run file that are no pool and no learner: models, prompts, checks, logs, cluster."""

from typing import Annotated, Any, Literal

from msgspec import Meta, field

from cluster.config.fields import Count, CountOrZero, Finite, Items, NonNegative, Positive, Section, Text
from cluster.config.stages import MAX_TEMPERATURE


class RunConfig(Section):
    """Sets the run's name, its length and its folder."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=128)] = "run"
    steps: Count = 100  # optimizer steps
    seed: CountOrZero = 0
    directory: Text = "runs"  # the run writes into directory/name
    hooks: tuple[Text, ...] = ()  # step hooks of your own, each as package.module:Class; docs/extending.md


class StudentConfig(Section):
    """Names the model that samples and learns."""

    model: Text  # Hugging Face directory or hub id
    trust_remote_code: bool = False


class PromptsConfig(Section):
    """Sets the prompts of a run."""

    # A file (JSONL, JSON, Parquet, CSV), a folder, owner/name[/subset][:split] of the hub, PACKAGE:TASK; docs/data.md
    train: Text
    held_out: Text | None = None  # the same
    # Our name = theirs, such as prompt = "question"; dots lead into a column. Further names are kept for rewards.
    columns: dict[str, Text] = field(default_factory=dict)
    answer_after: Text | None = None  # an answer is what follows this mark: "####" in GSM8K
    template: Literal["chat", "raw"] = "chat"
    system_prompt: str | None = None  # chat template only; a conversation's own comes first
    # Such as enable_thinking = false; a row's own column of this name comes first.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    last_answer: Literal["error", "drop", "prefill"] = "error"  # of conversations that end with the assistant's message
    too_long: Literal["error", "skip"] = "error"  # of prompts that leave no room for a completion
    prompts_per_step: Items = 64
    shuffle: bool = True  # a new order each epoch, fixed by run.seed


HARNESS_KINDS = ("harness", "verifiers")  # environments that ask the student over its endpoint
# Names that a run file may give to reward functions of ours, which read further columns of the prompts.
REWARDS_OF_PACKAGES = {"reasoning_gym": "rollout_workers.reasoning_gym_tasks:score"}


class EnvironmentConfig(Section):
    """Says what answers and rewards the student's completions, in training and on held-out prompts."""

    # Or "tools", "harness", "verifiers", or package.module:Class, an Environment or Agent of yours.
    kind: Text = "single_turn"
    # Compares a completion with its prompt's answer; reasoning_gym is the scorer of each task of that package.
    verifier: Literal["exact", "regex", "math", "reasoning_gym"] = "exact"
    # In the verifier's place: weights of verifiers, and of functions of yours as package.module:function.
    rewards: dict[Text, Finite] = field(default_factory=dict)
    reward_seconds: Positive = 30.0  # the longest that a function of yours may take for one completion
    harness: Text | None = None  # package.module:function of yours that drives an agent; for kind = "harness"
    arguments: dict[str, Any] = field(default_factory=dict)  # further ones of the harness; of "verifiers", its [env]
    python: Text | None = None  # that runs the harness, where its packages are; None: the rollout worker's own
    episodes_at_once: Count = 64  # harnesses that run at the same time, per rollout worker
    max_observation_tokens: CountOrZero = 0  # that the environment may add to one prompt; the context is so much longer
    max_turns: CountOrZero = 0  # completions of one episode; 0: as many as the environment asks for
    max_turn_tokens: CountOrZero = 0  # of one completion; 0: what is left of rollout.max_completion_tokens
    episode_seconds: NonNegative = 0.0  # after which no further completion begins; 0: no limit
    tools: tuple[Text, ...] = ()  # functions of yours as package.module:function, for kind = "tools"
    tool_format: Text = "hermes"  # how the student writes calls: hermes, json, or the name of a tool parser of vLLM
    tool_seconds: Positive = 10.0  # the longest that a call of a tool may take

    def __post_init__(self) -> None:
        if (self.kind == "harness") != (self.harness is not None):
            raise ValueError(
                f"environment.kind is '{self.kind}' and environment.harness is {self.harness!r}; kind = 'harness' "
                "needs the import path of one, and no other kind has any"
            )
        if self.kind not in HARNESS_KINDS and (self.python is not None or self.arguments):
            name = "python" if self.python is not None else "arguments"
            raise ValueError(f"environment.{name} is for kind = 'harness' and 'verifiers', found '{self.kind}'")

    @property
    def weights(self) -> dict[str, float]:
        """Return the verifiers and reward functions with their weights."""
        named = self.rewards or {self.verifier: 1.0}
        return {REWARDS_OF_PACKAGES.get(name, name): weight for name, weight in named.items()}

    @property
    def reward_name(self) -> str:
        """Return what the mean reward is called: of verifiers alone, it is the share of right completions."""
        return "reward" if self.rewards or self.verifier in REWARDS_OF_PACKAGES else "accuracy"

    @property
    def reads_columns(self) -> bool:
        """Return whether code of the user's may read further columns of the prompts."""
        return self.kind in HARNESS_KINDS or any(":" in name for name in (self.kind, *self.weights))

    @property
    def has_turns(self) -> bool:
        """Return whether an episode may have several turns, so that its environment reads the prompt's whole row."""
        return self.kind != "single_turn"


class EvaluationConfig(Section):
    """Sets how held-out prompts are sampled and rewarded before, during and after training."""

    every_steps: CountOrZero = 0  # 0: before and after only
    num_prompts: CountOrZero = 0  # 0: all held-out prompts
    samples_per_prompt: Items = 1
    temperature: Annotated[float, Meta(ge=0, le=MAX_TEMPERATURE)] = 1.0  # 0: greedy
    teacher_too: bool = True  # measure the teachers on the same prompts, once


class ScoreAuditConfig(Section):
    """Sets how often every replica of every teacher is audited on a few trajectories of the run."""

    every_steps: CountOrZero = 50  # 0: at the start only; a replica that is started again is audited in any case
    rows: CountOrZero = 4  # short ones, each scored twice; 0: no audit
    # Mean difference per token, in nats, that answers of the same weights may show; None: what the dtype explains.
    tolerance_nats: Positive | None = None


class CheckpointConfig(Section):
    """Sets when the whole training state is written, and how many copies stay."""

    every_steps: CountOrZero = 0  # 0: only after the last step
    keep_last: Count = 2
    export: bool = True  # write a Hugging Face directory when the run ends


class LoggingConfig(Section):
    """Sets where metrics go besides metrics.jsonl, the terminal and Ray."""

    tensorboard: bool | None = None  # event files in the run directory; None: where the package is installed
    wandb_project: Text | None = None  # also to Weights & Biases, whose package is not among the dependencies
    trackio_project: Text | None = None  # also to Trackio, whose package is not among the dependencies either
    sample_table_steps: CountOrZero = 0  # every so many steps, kept rows as a table to all of these; 0: no text to them
    kept_rows: CountOrZero = 4  # trajectories of a step that `preceptor report` shows token by token; 0: none
    kept_every_steps: Count = 2  # of every so many steps, and of the first; steps of seconds can afford 1
    kept_mib: Positive = 64.0  # of them in the run directory; beyond it, every second file goes
    trace_steps: CountOrZero = 10  # first and last steps of which trace.json shows every call to a worker; 0: none


class RayConfig(Section):
    """Sets where the actors run, and how long the run waits for them."""

    address: Text | None = None  # None: RAY_ADDRESS if set, else a local cluster that the run starts and ends
    share_gpu: bool = False  # put all pools and the learner on one GPU, each with its part of the memory
    dashboard: bool = True
    dashboard_host: str = "127.0.0.1"  # of a local cluster's dashboard; 0.0.0.0: all interfaces, behind the token
    preload: bool = True  # on a local cluster: import torch and vLLM once, and fork the workers from there
    start_timeout_seconds: Positive = 600.0
    call_timeout_seconds: Positive = 1800.0
    max_restarts: CountOrZero = 3  # of each worker, and of the learner, within the window
    restart_window_seconds: Positive = 600.0
    silence_seconds: Positive = 30.0  # a rollout or teacher worker that gives no sign of life for so long is ended
