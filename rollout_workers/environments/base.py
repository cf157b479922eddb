"""Defines what an environment does: it opens an episode, answers each completion, and rewards the episode.

An episode is a loop of turns: `start` gives the tokens before the first completion; the student samples a completion;
`step` answers it with an observation, after which the student samples again, or with the outcome, which ends the
episode. An agent leads the loop itself and asks for completions. A new one is made for every episode, so it may keep
state between its calls.
"""

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from cluster.config.sections import EnvironmentConfig
from cluster.contracts.errors import ConfigError
from cluster.contracts.import_path import is_import_path, load_object
from cluster.contracts.requests import Completion
from cluster.contracts.trajectory import Ints
from rollout_workers.environments.tool_calls import ReadCalls, hermes_calls
from rollout_workers.environments.verifier_process import VerifierProcess
from rollout_workers.prompt_row import PromptRow

if TYPE_CHECKING:
    from rollout_workers.environments.chat import Chat
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
    row: PromptRow | None = None  # the row of the file; None: nothing of the run reads it


@dataclass(frozen=True)
class Observation:
    """Continues an episode: the student reads these tokens, which are never trained on, and samples again."""

    token_ids: TokenIds
    reward: float | None = None  # of the episode if a limit ends it here: no token is left to sample or to read
    # Whether these are all tokens that it reads, from the prompt on. Those that it read and sampled before stay as they
    # are where these begin with them; where they do not, the row ends, and a further one begins.
    is_whole: bool = False


@dataclass(frozen=True)
class Outcome:
    """Ends an episode."""

    reward: float | None  # None: there is nothing to reward
    feedback: str = ""  # what a teacher's context may say of the completion, such as the output of failed tests


class Environment(Protocol):
    """Answers the completions of one episode; whatever it raises ends the episode as failed."""

    async def start(self, prompt: Prompt, seed: int) -> TokenIds:
        """Return the token ids before the first completion; whatever is random here must follow from `seed`."""

    async def step(self, completion: Completion) -> Observation | Outcome:
        """Answer a completion, which may have ended at a limit: see its finish reason."""


@runtime_checkable
class Agent(Protocol):
    """Leads one episode itself, as a program does that was written for any model."""

    async def run(self, prompt: Prompt, seed: int, sample: Callable[[TokenIds], Awaitable[Completion]]) -> Outcome:
        """Ask for completions and return the outcome.

        `sample` takes all tokens that the student reads, earlier completions as they were sampled, and raises
        `LimitReached` (episode.py) where no further completion may be sampled; not caught, it ends the episode.
        """


@dataclass(frozen=True)
class Services:
    """Gives the environments of one worker the student's tokenizer and the verifier that the run file names."""

    encode: Callable[[str], Sequence[int]]  # text to token ids, none added
    decode: Callable[[Ints], str]  # token ids to text, without special tokens
    verifier: VerifierProcess = field(default_factory=VerifierProcess)
    stop: Sequence[str] = ()  # strings that end a completion
    settings: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    chat: "Chat | None" = None  # None: no environment of the run continues conversations
    read_calls: ReadCalls = hermes_calls  # the tool calls of a completion's text
    harness: "HarnessRuntime | None" = None  # what the run's agents ask the student by; None: they do not

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


NewEnvironment = Callable[[Services], Environment | Agent]

ENVIRONMENTS: dict[str, NewEnvironment | str] = {  # a text: the import path of one that not every run loads
    "single_turn": SingleTurn,
    "tools": "rollout_workers.environments.tools:Tools",
    "harness": "rollout_workers.harness.environment:HarnessEnvironment",
    "verifiers": "rollout_workers.harness.environment:HarnessEnvironment",
}


def environment_named(kind: str) -> NewEnvironment:
    """Return the class that the run file names; raise ConfigError if there is none, or it cannot be imported."""
    if kind not in ENVIRONMENTS and not is_import_path(kind):
        names = ", ".join(ENVIRONMENTS)
        raise ConfigError(f"environment.kind is '{kind}'; expected {names}, or package.module:Class for one of yours")
    named = ENVIRONMENTS.get(kind, kind)
    new: NewEnvironment = load_object(named, "an environment") if isinstance(named, str) else named
    verbs = [verb for verb in ("start", "step", "run") if callable(getattr(new, verb, None))]
    if isinstance(new, type) and not {"start", "step"} <= set(verbs) and "run" not in verbs:
        raise ConfigError(f"environment.kind: {kind} has neither start and step, nor run (docs/extending.md)")
    try:
        inspect.signature(new).bind(None)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"environment.kind: {kind} cannot be made from the services alone: {error}") from error
    return new
