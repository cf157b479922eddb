"""The seams: what the driver passes between pools, and what an engine must do to serve a worker."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cluster.contracts.metrics import Metrics
from cluster.contracts.observation import Span
from cluster.contracts.trajectory import Bytes, FinishReason, Floats, Ints


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn."""

    max_completion_tokens: int
    temperature: float  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: whole vocabulary
    stop: tuple[str, ...] = ()
    num_candidates: int = 0  # tokens besides the written one to return per position
    candidates: Literal["topk", "draws"] = "topk"  # the most likely ones, or independent draws
    stop_repetition: int = 0  # longest passage whose repetition ends a completion, in tokens; 0: none does


@dataclass(frozen=True)
class RolloutRequest:
    """One completion to draw; the prompt's tokens stay with the workers, only its id travels."""

    trajectory_id: int
    prompt_id: int
    sample_index: int
    seed: int  # in [0, 2**63)


@dataclass(frozen=True)
class Completion:
    """What an engine wrote for one request."""

    token_ids: Ints  # [completion_tokens], the EOS token included when it was sampled
    logprobs: Floats  # [completion_tokens] under the sampling distribution
    finish_reason: FinishReason
    policy_versions: Ints  # [completion_tokens] that wrote each token; 0: the weights that the engine started with
    candidate_ids: Ints | None = None  # [completion_tokens, k] as the sampling settings ask
    candidate_logprobs: Floats | None = None  # [completion_tokens, k] under the sampling distribution


@dataclass(frozen=True)
class BatchHandle:
    """A trajectory batch as the driver sees it: where its bytes are, and counts that do not grow with its length."""

    reference: Any  # ray.ObjectRef to the batch's wire bytes (pa.Buffer)
    teacher: str
    trajectory_ids: tuple[int, ...]
    num_tokens: tuple[int, ...]  # prompt + completion, per row
    num_completion_tokens: tuple[int, ...]  # per row
    prompt_ids: tuple[int, ...] = ()  # per row
    rewards: tuple[float | None, ...] = ()  # per row
    min_policy_versions: tuple[int, ...] = ()  # per row
    max_policy_versions: tuple[int, ...] = ()  # per row
    rollout: int = 0  # which request of the rollout pool it answers; in training the step
    is_last: bool = False  # whether the worker that wrote it has written everything of the rollout
    metrics: Metrics = field(default_factory=dict)
    spans: tuple[Span, ...] = ()  # of the calls that made it, in order; the pools fill them in
    scored_by: Mapping[str, str] = field(default_factory=dict)  # [teachers.NAME] -> fingerprint of its checkpoint


class BatchSource(Protocol):
    """The scored batches of one step, of which some may still be on their way."""

    @property
    def is_exhausted(self) -> bool:
        """Return whether every batch was given out."""

    def take(self, wake_on: Sequence[Any] = ()) -> list[BatchHandle]:
        """Return the batches not given out yet, waiting for one; with none when a reference of `wake_on` is ready."""


class AtHand:
    """A BatchSource of batches that are all there."""

    def __init__(self, handles: Iterable[BatchHandle]) -> None:
        self._handles = list(handles)

    @property
    def is_exhausted(self) -> bool:
        """Return whether the batches were given out."""
        return not self._handles

    def take(self, wake_on: Sequence[Any] = ()) -> list[BatchHandle]:
        """Return all."""
        handles, self._handles = self._handles, []
        return handles


@dataclass(frozen=True)
class ScoreRequest:
    """What one scoring model adds to a batch: always the log-probabilities of the written tokens, and more if asked.

    Example:
        >>> ScoreRequest("teacher", top_k=16).given_candidates
        False
    """

    model: str  # its role in the objective's target; names the columns
    top_k: int = 0  # above 0: choose this many candidates, its own most likely tokens, and score them
    given_candidates: bool = False  # score the candidates that the batch already has
    entropy: bool = False  # of its distribution at every completion position
    hidden: bool = False  # its last hidden states


class RolloutEngine(Protocol):
    """Draws completions; its weights can be replaced while it runs (vLLM's weight-transfer verbs)."""

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        """Draw one completion; many calls run at once and are batched by the engine.

        When not all of them fit, those of the lowest `priority` run first.
        """

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Open the receiving end of the configured backend, once."""

    async def start_weight_update(self) -> None:
        """Pause generation, keeping running requests, and make the model ready to receive."""

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive one bucket."""

    async def finish_weight_update(self, policy_version: int) -> str:
        """Install the weights, drop caches computed with the old ones, resume; return the received checksum."""

    async def shutdown(self) -> None:
        """End the engine and every process it started."""


@dataclass(frozen=True)
class HiddenStates:
    """What a scoring engine read of one trajectory."""

    values: Any  # torch tensor [completion_tokens, width]: they predict the completion tokens
    num_cached_tokens: int  # at the trajectory's beginning, that were computed for another one


class ScoringEngine(Protocol):
    """Reads tokens that another model wrote."""

    async def hidden_states(self, request_id: str, token_ids: Ints, loss_mask: Bytes) -> HiddenStates:
        """Return the last hidden states, after the final norm, that predict the tokens whose loss_mask is 1."""

    @property
    def is_dead(self) -> bool:
        """Return whether the engine's process is gone."""

    async def sleep(self) -> None:
        """Give the hardware back to another engine; nothing is asked until it is woken."""

    async def wake(self) -> None:
        """Take the hardware again."""

    async def shutdown(self) -> None:
        """End the engine and every process it started."""
