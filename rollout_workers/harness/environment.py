"""Makes agents and harnesses environments: what a harness asks the student over the endpoint are an episode's turns.

A harness is a function `run(base_url, api_key, prompt, **arguments)`, mostly an async one. It calls the student by any
client of OpenAI's interface, and returns the episode's reward, or None to leave that to the run's verifier.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

from cluster.config.sections import EnvironmentConfig
from cluster.contracts.errors import PromptError
from cluster.contracts.requests import Completion
from rollout_workers.environments.base import Outcome, Prompt, Services, TokenIds
from rollout_workers.episode import LimitReached
from rollout_workers.harness.chat import ChatHistory, answer_of, as_messages, chat_completion
from rollout_workers.harness.endpoint import Call, Calls, Endpoint
from rollout_workers.harness.process import VERIFIERS, HarnessProcess
from rollout_workers.rendering import messages_of

Sample = Callable[[TokenIds], Awaitable[Completion]]
CUT_OFF = (
    0.0  # reward of an episode that a limit ends while its harness still asks: as verifiers count such completions
)


class HarnessRuntime:
    """Holds what the episodes of one rollout worker share: the endpoint and the process of their harness."""

    def __init__(self, config: EnvironmentConfig, host: str) -> None:
        """Take the address to listen at; nothing starts before the first episode."""
        self.endpoint = Endpoint(host)
        self.process = HarnessProcess(config.harness or f"{VERIFIERS}:run", config.python, config.episodes_at_once)
        self.arguments = config.arguments

    async def shutdown(self) -> None:
        await self.process.shutdown()
        await self.endpoint.shutdown()


class HarnessEnvironment:
    """Runs a harness for one episode; each of its requests is a completion."""

    def __init__(self, services: Services) -> None:
        assert services.harness is not None
        assert services.chat is not None
        self._services, self._runtime, self._chat = services, services.harness, services.chat
        self._limit: LimitReached | None = None  # that refused a request
        self._last: Completion | None = None

    async def run(self, prompt: Prompt, seed: int, sample: Sample) -> Outcome:
        """Answer the harness's requests until it ends; cancelled, end it and refuse what it still asks."""
        assert prompt.row is not None
        endpoint, history = self._runtime.endpoint, ChatHistory(self._chat, prompt.row)
        await endpoint.start()
        key, calls = endpoint.open()
        given = {
            "messages": messages_of(prompt.row),
            "text": prompt.text,
            "answer": prompt.answer,
            "domain": prompt.domain,
            "columns": dict(prompt.columns),
            "seed": seed,
        }
        arguments = {**self._runtime.arguments, "base_url": endpoint.base_url, "api_key": key, "prompt": given}
        running = asyncio.create_task(self._runtime.process.run(arguments))
        try:
            while (call := await _next(calls, running)) is not None:
                await self._answer(call, history, sample)
            return await self._outcome(prompt, running.result())
        finally:
            endpoint.close(key)
            running.cancel()

    async def _answer(self, call: Call, history: ChatHistory, sample: Sample) -> None:
        try:
            text, token_ids = history.read(as_messages(call.body["messages"]), call.body.get("tools"))
            completion = await sample(token_ids)
        except PromptError as error:
            call.refuse(str(error))
        except LimitReached as limit:
            self._limit = limit
            call.refuse("a limit of the episode allows no further completion")
        else:
            self._last = completion
            content = self._chat.content(completion.token_ids)
            answer = answer_of(content, self._services.read_calls(content) if call.body.get("tools") else [])
            history.add(text, token_ids, completion, answer)
            call.answer(chat_completion(call.body, answer, completion, token_ids, self._chat.decode))
        finally:
            call.refuse("the episode is over")  # unless it is answered

    async def _outcome(self, prompt: Prompt, result: dict[str, Any]) -> Outcome:
        """Return what the harness came to.

        One that fails because of a limit has not failed, and its reward is that of a completion that was cut off.
        """
        if "error" in result and self._limit is not None:
            return Outcome(CUT_OFF)
        if "error" in result:
            raise HarnessError(result["error"])
        if self._last is None:
            raise HarnessError("the harness ended without a completion")
        reward = result["reward"]
        if reward is None:
            reward = await self._services.reward(prompt, self._last)
        elif not math.isfinite(reward):
            raise HarnessError(f"the harness returned the reward {reward}; expected a finite number")
        return Outcome(reward, result.get("feedback", ""))


class HarnessError(Exception):
    """Says why a harness came to no outcome; its episode counts as one whose environment failed."""


async def _next(calls: Calls, running: asyncio.Task[dict[str, Any]]) -> Call | None:
    """Wait for a request whose client still waits; return None when the harness ends instead."""
    while True:
        coming = asyncio.ensure_future(calls.get())
        try:
            await asyncio.wait({coming, running}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                return None
        finally:
            coming.cancel()
        if not coming.result().is_given_up:
            return coming.result()
