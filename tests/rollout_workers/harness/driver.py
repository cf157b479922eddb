"""Plays episodes of harnesses with a real process and real HTTP; the student's completions are scripted."""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from cluster.config.sections import EnvironmentConfig, PromptsConfig
from cluster.contracts.requests import Completion
from rollout_workers.environments.base import Outcome, Prompt, Services, TokenIds
from rollout_workers.environments.chat import Chat
from rollout_workers.episode import LimitReached
from rollout_workers.harness.environment import HarnessEnvironment, HarnessRuntime
from rollout_workers.prompt_row import PromptRow

AGENTS = "tests.rollout_workers.harness.agents"


class ScriptedEpisode:
    """Plays a harness with scripted completions, and keeps what the student would have read and sampled."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, harness: str | None = None, **config: Any) -> None:
        """Take a harness of `agents` or by its path, or none for one of verifiers; and settings of the run file."""
        self.tokenizer = tokenizer
        path = harness if harness is None or ":" in harness else f"{AGENTS}:{harness}"
        kind = "harness" if path else "verifiers"
        self.runtime = HarnessRuntime(EnvironmentConfig(kind, harness=path, **config), "127.0.0.1")
        self.services = Services(
            lambda text: tokenizer.encode(text, add_special_tokens=False),
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            chat=Chat(tokenizer, PromptsConfig("prompts.jsonl"), datetime.now()),
            harness=self.runtime,
        )
        self.rows: list[list[int]] = []  # what the student read and sampled

    def ids(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False)]

    async def play(self, *sampled: Sequence[int], columns: dict[str, Any] | None = None) -> Outcome:
        """Run a harness whose student samples this; where no more is left, a limit is reached."""
        left = list(sampled)

        async def sample(token_ids: TokenIds) -> Completion:
            if not left:
                raise LimitReached("length")
            whole = [int(token) for token in token_ids]
            if self.rows and whole[: len(self.rows[-1])] == self.rows[-1]:
                self.rows.pop()
            self.rows.append([*whole, *left[0]])
            return completion(left.pop(0))

        prompt = Prompt(np.array([1], np.int32), "one", "main", "", "answer", columns or {}, row=PromptRow("one"))
        return await HarnessEnvironment(self.services).run(prompt, 7, sample)

    async def shutdown(self) -> None:
        self.services.verifier.close()
        await self.runtime.shutdown()


def completion(ids: Sequence[int]) -> Completion:
    logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32)
    return Completion(np.array(ids, np.int32), logprobs, "stop", np.zeros(len(ids), np.int32))


def play(episode: ScriptedEpisode, *sampled: Sequence[int], columns: dict[str, Any] | None = None) -> Any:
    async def run() -> Any:
        try:
            return await episode.play(*sampled, columns=columns)
        finally:
            await episode.shutdown()

    return asyncio.run(run())
