"""Defines what an environment does: it opens a trajectory, answers each completion, and rewards the trajectory.

A trajectory is a loop of turns: `start` gives the tokens before the first completion; the student samples a completion;
`step` answers it with an observation, after which the student samples again, or with the outcome, which ends the
trajectory. A new environment is made for every trajectory, so it may keep state between its calls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cluster.contracts.errors import ConfigError
from cluster.contracts.import_path import is_import_path, load_object
from cluster.contracts.requests import Completion
from cluster.contracts.trajectory import Ints
from rollout_workers.environments.verifier_process import VerifierProcess

if TYPE_CHECKING:
    from rollout_workers.harness.environment import HarnessRuntime

if TYPE_CHECKING:
    from rollout_workers.harness.environment import HarnessRuntime

TokenIds = Sequence[int] | Ints


@dataclass(frozen=True)
class Prompt:
    """Holds one row of the prompts, tokenised."""

    token_ids: Ints  # [prompt_tokens] special tokens included
    text: str  # as the file gives it; of a conversation, the last message
    teacher: str
    domain: str
    answer: str | None  # None: nothing to verify against
    columns: Mapping[str, Any] = field(default_factory=dict)  # further ones of the prompt's row
    teacher_token_ids: Ints | None = None  # as a teacher with its own tokenizer reads it


@dataclass(frozen=True)
class Observation:
    """Continues a trajectory: the student reads these tokens, which are never trained on, and samples again."""

    token_ids: TokenIds
    reward: float | None = None  # of the trajectory if a limit ends it here: no token is left to sample or to read
    continues: bool = True  # False: the tokens are all that the student reads, and begin another row of the episode


@dataclass(frozen=True)
class Outcome:
    """Ends a trajectory."""

    reward: float | None  # None: there is nothing to reward
    feedback: str = ""  # what a teacher's context may say of the completion, such as the output of failed tests


class Environment(Protocol):
    """Answers the completions of one trajectory."""

    async def start(self, prompt: Prompt, seed: int) -> TokenIds:
        """Return the token ids before the first completion; whatever is random here must follow from `seed`."""

    async def step(self, completion: Completion) -> Observation | Outcome:
        """Answer a completion, which may have ended at a limit: see its finish reason."""


@dataclass(frozen=True)
class Services:
    """Gives the environments of one worker the student's tokenizer and the verifier that the run file names."""

    encode: Callable[[str], Sequence[int]]  # text to token ids, none added
    decode: Callable[[Ints], str]  # token ids to text, without special tokens
    verifier: VerifierProcess = field(default_factory=VerifierProcess)
    stop: Sequence[str] = ()  # strings that end a completion
    harness: "HarnessRuntime | None" = None  # of an agent that asks the student over the worker's endpoint
    harness: "HarnessRuntime | None" = None  # of an agent that asks the student over the worker's endpoint

    def text_of(self, completion: Completion) -> str:
        """Return what precedes the first stop string, without white space at the ends; the stop string is no answer."""
        text = self.decode(completion.token_ids)
        ends = [text.find(string) for string in self.stop if string in text]
        return text[: min(ends, default=len(text))].strip()

    async def reward(self, prompt: Prompt, completion: Completion) -> float | None:
        """Return the completion's reward: 1 or 0 by the run's verifier, a number by its reward functions.

        None: no reward is known, because a verifier has no answer to compare with or a function took too long.
        """
        return await self.verifier.reward(
            self.text_of(completion), prompt.answer, completion.finish_reason, prompt.text, prompt.columns
        )


class SingleTurn:
    """Rewards one completion by the run's verifier."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def start(self, prompt: Prompt, seed: int) -> TokenIds:
        self._prompt = prompt
        return prompt.token_ids

    async def step(self, completion: Completion) -> Outcome:
        return Outcome(await self._services.reward(self._prompt, completion))


NewEnvironment = Callable[[Services], Environment]

ENVIRONMENTS: dict[str, NewEnvironment] = {"single_turn": SingleTurn}


def environment_named(kind: str) -> NewEnvironment:
    """Return the class that the run file names; raise ConfigError if there is none, or it cannot be imported."""
    if is_import_path(kind):
        loaded: NewEnvironment = load_object(kind, "an environment")
        return loaded
    if kind not in ENVIRONMENTS:
        names = ", ".join(ENVIRONMENTS)
        raise ConfigError(f"environment.kind is '{kind}'; expected {names}, or package.module:Class for one of yours")
    return ENVIRONMENTS[kind]
