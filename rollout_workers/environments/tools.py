"""Lets the student call Python functions, as many turns as it asks for, and rewards its answer."""

from cluster.contracts.errors import ConfigError
from cluster.contracts.requests import Completion
from rollout_workers.environments.base import Observation, Outcome, Prompt, Services, TokenIds
from rollout_workers.environments.chat import Conversation
from rollout_workers.environments.tool_calls import Call, names_of


class Tools:
    """Answers tool calls with what the functions return; a completion without a call is the answer.

    What goes wrong in a call, the tool's own errors and its time limit too, is what the student reads next.
    """

    def __init__(self, services: Services) -> None:
        if services.chat is None:
            raise ConfigError("environment.kind = 'tools' continues conversations; set prompts.template = 'chat'")
        self._services, self._chat = services, services.chat
        self._paths = names_of(services.settings.tools)

    async def start(self, prompt: Prompt, seed: int) -> TokenIds:
        """Return the prompt, in which the template has listed the tools."""
        assert prompt.row is not None
        self._prompt = prompt
        self._conversation = Conversation(self._chat, prompt.row)
        return prompt.token_ids

    async def step(self, completion: Completion) -> Observation | Outcome:
        """Run the calls of a completion, one after the other; without any, reward it.

        An episode that a limit ends before the answer has reward 0.
        """
        content = self._conversation.add_completion(completion.token_ids)
        calls = self._services.read_calls(content)
        if not calls:
            return Outcome(await self._services.reward(self._prompt, completion))
        results = [
            {"role": "tool", "name": str(call.get("name", "")), "content": await self._result(call)} for call in calls
        ]
        token_ids, is_whole = self._conversation.add(results)
        return Observation(token_ids, reward=0.0, is_whole=is_whole)

    async def _result(self, call: Call) -> str:
        """Return what the student reads of a call."""
        if "error" in call:
            return f"error: {call['error']}"
        if call["name"] not in self._paths:
            return f"error: there is no tool {call['name']}; the tools are {', '.join(self._paths)}"
        seconds = self._services.settings.tool_seconds
        return await self._services.verifier.call_tool(self._paths[call["name"]], call["arguments"], seconds)
