"""The seams: what the driver passes between pools, and what an engine must do to serve a worker."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.contracts.metrics import Metrics
from cluster.contracts.trajectory import FinishReason, Floats, Ints, TeacherScores


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn."""

    max_completion_tokens: int
    temperature: float  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: whole vocabulary
    stop: tuple[str, ...] = ()


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


@dataclass(frozen=True)
class BatchHandle:
    """A trajectory batch as the driver sees it: where its bytes are, and counts that do not grow with its length."""

    reference: Any  # ray.ObjectRef to the batch's wire bytes (pa.Buffer)
    teacher: str
    trajectory_ids: tuple[int, ...]
    num_tokens: tuple[int, ...]  # prompt + completion, per row
    num_completion_tokens: tuple[int, ...]  # per row
    metrics: Metrics = field(default_factory=dict)


class RolloutEngine(Protocol):
    """Draws completions; its weights can be replaced while it runs (vLLM's weight-transfer verbs)."""

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int
    ) -> Completion:
        """Draw one completion; many calls run at once and are batched by the engine."""

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


class ScoringEngine(Protocol):
    """Gives a teacher's log-probabilities of tokens that another model wrote."""

    async def score(self, request_id: str, token_ids: Ints, loss_mask: Any, top_k: int) -> TeacherScores:
        """Score the positions whose loss_mask is 1; `top_k = 0` asks for the sampled tokens only."""

    async def shutdown(self) -> None:
        """End the engine and every process it started."""
