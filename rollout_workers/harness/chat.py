"""Translates between chat completions, as clients of OpenAI's interface write them, and the tokens of a trajectory.

Token-in-token-out: sampled ids stay as they were sampled, and what a request adds to them is tokenised once. A request
continues a row if its rendered text begins with the text that the row's tokens have; then only the rest is tokenised.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from secrets import token_hex
from typing import Any

import msgspec
import numpy as np

from cluster.contracts.requests import Completion
from cluster.contracts.trajectory import Ints
from rollout_workers.environments.chat import Chat
from rollout_workers.prompt_row import Messages, PromptRow

Message = dict[str, Any]

_UNSUPPORTED = {"n": 1, "best_of": 1, "functions": None, "response_format": None}  # and what they may be


class ChatHistory:
    """Knows the tokens of an episode's conversations, and gives each request the ones that it continues."""

    def __init__(self, chat: Chat, row: PromptRow) -> None:
        """Take the student's chat template, and the prompt's row, whose settings of the template hold for requests."""
        self._chat, self._row = chat, row
        self._rows: list[tuple[str, list[int]]] = []  # text and ids of what was read and sampled, the last one last
        self._sampled: dict[str, Message] = {}  # by the id of their first tool call: messages as they were sampled

    def read(self, messages: Messages, tools: Messages | None) -> tuple[str, list[int]]:
        """Return the text that the student reads from the beginning on, and its ids.

        If the text begins with that of a row, the ids begin with the row's, the sampled ones among them.

        Raises:
            PromptError: the chat template refuses the messages.
        """
        asked = [self._as_sampled(message) for message in messages]
        text = self._chat.text(msgspec.structs.replace(self._row, prompt=asked, tools=tools), [])
        for begin, token_ids in reversed(self._rows):
            if text.startswith(begin):
                return text, [*token_ids, *self._chat.encode(text[len(begin) :]).tolist()]
        return text, self._chat.encode(text).tolist()

    def add(self, text: str, token_ids: list[int], completion: Completion, answer: Message) -> None:
        """Take what the student sampled after it read `text`; `answer` is the message that the client gets for it."""
        whole = [*token_ids, *completion.token_ids.tolist()]
        before, after = (self._chat.decode(np.asarray(ids, np.int32)) for ids in (token_ids, whole))
        self._rows.append((text + after[len(before) :], whole))
        for call in answer.get("tool_calls", [])[:1]:
            self._sampled[call["id"]] = {"role": "assistant", "content": self._chat.content(completion.token_ids)}

    def _as_sampled(self, message: Message) -> Message:
        """Return an assistant's message with tool calls as the student wrote it, if it did."""
        for call in message.get("tool_calls") or []:
            return self._sampled.get(call.get("id", ""), message)
        return message


def fault(body: Any) -> str | None:
    """Return what of a request cannot be served, as a sentence."""
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        return "the request has no messages"
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in body["messages"]):
        return "every message is an object with a role"
    for name, value in _UNSUPPORTED.items():
        if body.get(name, value) not in (value, None):
            return f"`{name}` is {body[name]!r}, which this endpoint does not serve"
    return None


def as_messages(messages: Messages) -> Messages:
    """Return messages as chat templates read them: texts in the place of lists of text parts, arguments as objects."""
    return [_as_message(message) for message in messages]


def _as_message(message: Message) -> Message:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)
    changed = {**message, "content": content or ""}
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [_with_arguments(call) for call in calls]
    return {name: value for name, value in changed.items() if value is not None}


def _with_arguments(call: Message) -> Message:
    function = call.get("function") or {}
    try:
        return {**call, "function": {**function, "arguments": json.loads(function.get("arguments") or "{}")}}
    except (TypeError, ValueError):
        return call


def answer_of(text: str, calls: Sequence[Mapping[str, Any]]) -> Message:
    """Return the assistant's message that a completion is; what is no whole call stays text."""
    whole = [call for call in calls if "error" not in call]
    if not whole:
        return {"role": "assistant", "content": text}
    content = text.partition("<tool_call>")[0].strip() if "<tool_call>" in text else ""
    return {"role": "assistant", "content": content or None, "tool_calls": [_tool_call(call) for call in whole]}


def _tool_call(call: Mapping[str, Any]) -> Message:
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
    return {"id": f"call_{token_hex(8)}", "type": "function", "function": function}


def chat_completion(
    body: Mapping[str, Any], answer: Message, completion: Completion, read: Sequence[int], decode: Callable[[Ints], str]
) -> dict[str, Any]:
    """Return the answer to a request; `read` are all ids before the completion.

    `return_token_ids`, as in vLLM, adds both ids.
    """
    reasons = {"stop": "tool_calls" if answer.get("tool_calls") else "stop", "length": "length"}
    choice: dict[str, Any] = {
        "index": 0,
        "message": answer,
        "finish_reason": reasons.get(completion.finish_reason, "stop"),
        "logprobs": None,
    }
    if body.get("logprobs"):
        tokens = zip(completion.token_ids, completion.logprobs, strict=True)
        choice["logprobs"] = {"content": [_logprob(decode(token[None]), logprob) for token, logprob in tokens]}
    sizes = len(read), len(completion.token_ids)
    made: dict[str, Any] = {
        "id": f"chatcmpl-{token_hex(12)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": str(body.get("model") or "student"),
        "choices": [choice],
        "usage": {"prompt_tokens": sizes[0], "completion_tokens": sizes[1], "total_tokens": sum(sizes)},
    }
    if body.get("return_token_ids"):
        made["prompt_token_ids"] = list(read)
        choice["token_ids"] = completion.token_ids.tolist()
    return made


def _logprob(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": float(logprob), "bytes": list(token.encode()), "top_logprobs": []}


def chunks(made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a finished answer as the two events of a stream: all of the message, and how it ended."""
    [choice] = made["choices"]
    message = dict(choice["message"])
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    common = {**{name: made[name] for name in ("id", "created", "model")}, "object": "chat.completion.chunk"}
    whole = {"index": 0, "delta": message, "logprobs": choice["logprobs"], "finish_reason": None}
    end = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]}
    return [{**common, "choices": [whole]}, {**common, "choices": [end], "usage": made["usage"]}]
