"""Makes agents and harnesses environments: what a harness asks of the student over the endpoint are the episode's turns.

A harness is a function `run(base_url, api_key, prompt, **arguments)`, mostly an async one. It calls the student by any
client of OpenAI's interface, and returns the episode's reward, or None to leave that to the run's verifier.
"""

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.config.sections import EnvironmentConfig
from cluster.contracts.errors import RolloutError
from cluster.contracts.requests import Completion
from cluster.contracts.trajectory import Ints
from rollout_workers.environments.base import Observation, Outcome, Prompt, Services
from rollout_workers.harness.chat import ChatRow, Render, answer_of, as_messages, chat_completion
from rollout_workers.harness.endpoint import Call, Endpoint
from rollout_workers.harness.process import HarnessProcess
from rollout_workers.rendering import TEMPLATE_ERRORS

VERIFIERS = str(Path(__file__).with_name("verifiers_package.py")) + ":run"  # the harness of environments by name
CUT_OFF = 0.0  # reward of an episode that a limit ends while its harness still asks: as verifiers count such completions


class HarnessRuntime:
    """Holds what the episodes of one rollout worker share: the endpoint and the process of their harness."""

    def __init__(self, config: EnvironmentConfig, host: str, render: Render, decode: Callable[[Ints], str]) -> None:
        """Take the address to listen at, the chat template, and a `decode` that writes special tokens too."""
        self.endpoint = Endpoint(host)
        self.process = HarnessProcess(config.harness or VERIFIERS, config.python, config.episodes_at_once)
        self.arguments = config.arguments
        self.render, self.decode = render, decode

    async def shutdown(self) -> None:
        await self.process.shutdown()
        await self.endpoint.shutdown()


class HarnessEnvironment:
    """Runs a harness for one trajectory; its requests are the turns."""

    def __init__(self, services: Services) -> None:
        assert services.harness is not None
        self._services, self._runtime = services, services.harness
        self._row = ChatRow(self._runtime.render, services.encode, self._runtime.decode)
        self.key, self._calls = self._runtime.endpoint.open()
        self._call: Call | None = None
        self._running: asyncio.Task[dict[str, Any]] | None = None

    async def start(self, prompt: Prompt, seed: int) -> list[int]:
        """Start the harness, and return what its first request asks."""
        self._prompt = prompt
        await self._runtime.endpoint.start()
        given = {"text": prompt.text, "answer": prompt.answer, "domain": prompt.domain, "seed": seed}
        arguments = {
            **self._runtime.arguments,
            "base_url": self._runtime.endpoint.base_url,
            "api_key": self.key,
            "prompt": {**given, "columns": dict(prompt.columns)},
        }
        self._running = asyncio.create_task(self._runtime.process.run(arguments))
        read = await self._next()
        if read is None:
            raise RolloutError(self._running.result().get("error", "the harness ended before its first request"))
        return read[0]

    async def step(self, completion: Completion) -> Observation | Outcome:
        """Answer the request with the completion; return what the next one asks, or what the harness came to."""
        assert self._call is not None
        assert self._running is not None
        text = self._services.decode(completion.token_ids)
        answer = answer_of(text, bool(self._call.body.get("tools")))
        made = chat_completion(self._call.body, answer, completion, self._row.token_ids, self._runtime.decode)
        self._row.add(completion, text, answer)
        self._call.answer(made)
        read = await self._next()
        if read is not None:
            added, continues = read
            return Observation(added, CUT_OFF, continues)
        result = self._running.result()
        if "error" in result:
            raise RolloutError(result["error"])
        reward = result["reward"]
        if reward is None:
            reward = await self._services.reward(self._prompt, completion)
        elif not math.isfinite(reward):
            raise RolloutError(f"the harness returned the reward {reward}; expected a finite number")
        return Outcome(reward, result.get("feedback", ""))

    async def close(self) -> None:
        """End the episode wherever it is: its key is void, the harness is cancelled."""
        if self._call is not None:
            self._call.refuse("the episode is over")
        self._runtime.endpoint.close(self.key)
        if self._running is not None and not self._running.done():
            self._running.cancel()

    async def _next(self) -> tuple[list[int], bool] | None:
        """Return what the next request asks and whether it continues the row; None if the harness ends instead."""
        while (call := await self._next_call()) is not None:
            try:
                read = self._row.read(as_messages(call.body["messages"]), call.body.get("tools"))
            except TEMPLATE_ERRORS as error:
                call.refuse(f"the chat template of the student refuses the messages: {error}")
                continue
            self._call = call
            return read
        return None

    async def _next_call(self) -> Call | None:
        """Wait for a request whose client still waits; return None if the harness ends instead."""
        assert self._running is not None
        while True:
            coming = asyncio.ensure_future(self._calls.get())
            await asyncio.wait({coming, self._running}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                return None
            if not coming.result().is_given_up:
                return coming.result()
