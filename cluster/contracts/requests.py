"""Defines what the driver requests of rollout and teacher workers, and what rollout engines answer."""

from dataclasses import dataclass
from typing import Literal

from cluster.contracts.columns import FinishReason, Floats, Ints

# Which prompts of their own scoring models get: all, so that rows without one are masked; those that are known before
# a completion is; or none.
ContextUse = Literal["all", "of_prompt", "none"]

# Ids from here on are of requests to the privileged sampler; those of ordinary ones stay below.
PRIVILEGED_IDS = 1 << 39


@dataclass(frozen=True)
class SamplingSettings:
    """Says how to sample completions."""

    max_completion_tokens: int  # sampled tokens of the whole trajectory
    temperature: float  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: whole vocabulary
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # besides the EOS of the model that samples
    num_candidates: int = 0  # tokens besides the sampled one to return per position
    candidates: Literal["topk", "sampled"] = "topk"  # the most likely ones, or independent samples
    stop_class: tuple[int, ...] = ()  # ids that count as one token; the first is sampled for all
    stop_repetition: int = 0  # longest passage whose repetition ends a completion, in tokens; 0: none does
    contexts: ContextUse = "all"  # of a run whose teachers have any


@dataclass(frozen=True)
class RolloutRequest:
    """Asks for one trajectory; the prompt's tokens stay with the workers, only its id travels."""

    trajectory_id: int
    prompt_id: int
    sample_index: int
    seed: int  # in [0, 2**63)

    @property
    def is_privileged(self) -> bool:
        """Return whether a sampler that knows more writes it: one text of several, which the worker selects."""
        return self.trajectory_id >= PRIVILEGED_IDS


@dataclass(frozen=True)
class Completion:
    """Holds what an engine sampled in one turn of a trajectory."""

    token_ids: "Ints"  # [completion_tokens], the EOS token included when it was sampled
    logprobs: "Floats"  # [completion_tokens] under the sampling distribution
    finish_reason: "FinishReason"
    policy_versions: "Ints"  # [completion_tokens] that sampled each token; 0: the weights that the engine started with
    candidate_ids: "Ints | None" = None  # [completion_tokens, k] as the sampling settings ask
    candidate_logprobs: "Floats | None" = None  # [completion_tokens, k] under the sampling distribution


@dataclass(frozen=True)
class ScoreRequest:
    """Names what one scoring model adds to a batch: the log-probabilities of the sampled tokens, and more signals."""

    model: str  # its role in the objective's target; names the columns
    top_k: int = 0  # above 0: choose this many candidates, its own most likely tokens, and score them
    given_candidates: bool = False  # score the candidates that the batch already has
    entropy: bool = False  # of its distribution at every completion position
    hidden: bool = False  # its last hidden states
    layers: bool = False  # hidden states of the layers that teachers.NAME.states names
    aligned: bool = False  # only where its own tokens and the student's cover the same bytes, and which those are
    further: tuple[str, ...] = ()  # import paths of signals that contracts/signals.py does not list
    compared_rows: float = 0.0  # share of the rows with a prompt of the model's own that it scores without it too

    @property
    def signals(self) -> frozenset[str]:
        """Return the keys that the answer's scores must have.

        Example:
            >>> sorted(ScoreRequest("teacher", top_k=16).signals)
            ['candidate_ids', 'candidate_logprobs', 'logprobs']
        """
        requested = {
            "logprobs": True,
            "candidate_ids": bool(self.top_k),
            "candidate_logprobs": bool(self.top_k) or self.given_candidates,
            "entropy": self.entropy,
            "hidden": self.hidden,
            "layers": self.layers,
            "aligned": self.aligned,
            "shared": self.aligned and self.given_candidates,
        }
        return frozenset(name for name, is_requested in requested.items() if is_requested).union(self.further)
