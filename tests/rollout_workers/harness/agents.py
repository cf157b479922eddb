"""Harnesses that the tests run: agents of a few lines, which ask the student over its endpoint."""

import asyncio
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def ask(base_url: str, api_key: str, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Ask by plain HTTP, as any client does; raise HTTPError for a refusal."""
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        json.dumps({"model": "student", "messages": messages, **more}).encode(),
        {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        made: dict[str, Any] = json.load(answer)
    return made


def two_turns(base_url: str, api_key: str, prompt: dict[str, Any], reward: float = 0.5) -> dict[str, Any]:
    """Ask, show the answer, ask again; not an async function, so it runs in a thread."""
    messages = [{"role": "user", "content": prompt["text"]}]
    first = ask(base_url, api_key, messages)["choices"][0]["message"]
    sys.stdout.write("what a harness prints is no answer\n")
    messages += [first, {"role": "user", "content": "again"}]
    second = ask(base_url, api_key, messages, return_token_ids=True, logprobs=True)
    return {"reward": reward, "feedback": json.dumps(second)}


def forgets(base_url: str, api_key: str, prompt: dict[str, Any]) -> None:
    """Ask a second time without the history, and leave the reward to the run's verifier."""
    ask(base_url, api_key, [{"role": "user", "content": prompt["text"]}])
    ask(base_url, api_key, [{"role": "user", "content": "again"}])


async def fails(base_url: str, api_key: str, prompt: dict[str, Any]) -> None:
    await asyncio.to_thread(ask, base_url, api_key, [{"role": "user", "content": "one"}])
    raise KeyError("no such tool")


async def never_asks(base_url: str, api_key: str, prompt: dict[str, Any]) -> float:
    return 1.0


async def dies(base_url: str, api_key: str, prompt: dict[str, Any]) -> None:
    os._exit(3)


def branches(base_url: str, api_key: str, prompt: dict[str, Any]) -> float:
    """Ask, and go on from the answer in two ways."""
    messages = prompt["messages"]
    first = ask(base_url, api_key, messages)["choices"][0]["message"]
    for further in ("two", "three"):
        ask(base_url, api_key, [*messages, first, {"role": "user", "content": further}])
    return 0.5


async def fails_for_odd_seeds(base_url: str, api_key: str, prompt: dict[str, Any]) -> float:
    await asyncio.to_thread(ask, base_url, api_key, prompt["messages"])
    if prompt["seed"] % 2:
        raise OSError("the disk is full")
    return 0.5


async def infinite(base_url: str, api_key: str, prompt: dict[str, Any]) -> float:
    await asyncio.to_thread(ask, base_url, api_key, [{"role": "user", "content": "one"}])
    return float("inf")


async def waits(base_url: str, api_key: str, prompt: dict[str, Any]) -> None:
    """Ask once, then make the prompt's file and wait; write the key into it when that is cancelled."""
    await asyncio.to_thread(ask, base_url, api_key, [{"role": "user", "content": "one"}])
    try:
        Path(prompt["columns"]["file"]).touch()
        await asyncio.sleep(600)
    finally:
        Path(prompt["columns"]["file"]).write_text(api_key)


def takes_what_it_gets(base_url: str, api_key: str, prompt: dict[str, Any]) -> float:
    """Ask until it is refused, and return a reward for what it has."""
    try:
        while True:
            ask(base_url, api_key, [{"role": "user", "content": prompt["text"]}])
    except urllib.error.HTTPError:
        return 0.75


def is_refused(base_url: str, api_key: str, prompt: dict[str, Any]) -> dict[str, Any]:
    """Ask what the prompt's columns say, and return why it was refused."""
    ask(base_url, api_key, [{"role": "user", "content": "one"}])
    try:
        ask(base_url, api_key, **prompt["columns"]["body"])
    except urllib.error.HTTPError as error:
        return {"reward": 0.0, "feedback": json.load(error)["error"]["message"]}
    return {"reward": 1.0}


async def openai_client(base_url: str, api_key: str, prompt: dict[str, Any]) -> dict[str, Any]:
    """Ask by the package openai: with tools, then as a stream."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=base_url, api_key=api_key)
    messages: list[Any] = [{"role": "user", "content": prompt["text"]}]
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    made = await client.chat.completions.create(model="student", messages=messages, tools=[tool])  # type: ignore[list-item]
    message = made.choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    for call in message.tool_calls or []:
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "three"})
    messages.append({"role": "user", "content": "again"})
    text = ""
    stream = await client.chat.completions.create(model="student", messages=messages, tools=[tool], stream=True)  # type: ignore[list-item]
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
    models = [model.id async for model in client.models.list()]
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]  # type: ignore[union-attr]
    return {"reward": 1.0, "feedback": json.dumps([made.choices[0].finish_reason, calls, text, models])}


async def external(base_url: str, api_key: str, prompt: dict[str, Any], folder: str) -> float:
    """Lead a conversation of three turns and one apart by the package openai, and write down all ids that came."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=base_url, api_key=api_key)
    seen = []

    async def answer(messages: list[Any]) -> str:
        made = await client.chat.completions.create(
            model="student", messages=messages, logprobs=True, extra_body={"return_token_ids": True}
        )
        seen.append([made.prompt_token_ids, made.choices[0].token_ids])  # type: ignore[attr-defined]
        return made.choices[0].message.content or ""

    conversation: list[Any] = list(prompt["messages"])
    for further in ("w20", "w21"):
        conversation.append({"role": "assistant", "content": await answer(conversation)})
        conversation.append({"role": "user", "content": further})
        if further == "w20":
            await answer([{"role": "user", "content": "w30 w31"}])  # of another agent, whose history is its own
    await answer(conversation)
    (Path(folder) / f"{prompt['seed']}.json").write_text(json.dumps(seen))
    return len(seen) / 4


def says_too_much(base_url: str, api_key: str, prompt: dict[str, Any]) -> dict[str, Any]:
    """Return more than a line may have."""
    ask(base_url, api_key, prompt["messages"])
    return {"reward": 1.0, "feedback": "a" * (1 << 25)}
