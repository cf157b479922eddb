"""Plays environments of the package `verifiers` from 0.4 on, its v1: tasksets, agents, rewards of tasks.

`verifiers_package.py` loads this file. An agent whose program is not named asks the student from within this process
and has no tools, so that nothing that the student writes is executed.
"""

import asyncio
import json
import math
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import verifiers.v1 as vf
from verifiers.v1.clients import EvalClientConfig, ModelContext
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.runtimes import ProgramResult
from verifiers.v1.utils.loaders import default_harness_id, env_config_type, load_environment, resolve_env_config

Task = tuple[str, dict[str, Any], int | None]  # a taskset, its settings, and how many of its tasks
IN_PROCESS = "preceptor_chat"  # the id of `ChatHarness`

__all__ = ["ChatHarness"]

_environments: dict[str, tuple[Any, list[Any]]] = {}  # with their tasks, by what the run file says
_loading = asyncio.Lock()  # a second episode uses an environment when it serves
_serving = AsyncExitStack()


class ChatHarness(vf.Harness[vf.HarnessConfig]):
    """Asks the model for one message per segment, without a program of its own."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: dict[str, str], data: Any
    ) -> Any:
        system, prompt = self.resolve_prompt(data)
        messages = _messages(system, prompt)
        async with httpx.AsyncClient(timeout=None) as client:
            answer = await client.post(
                f"{endpoint}/chat/completions",
                json={"model": ctx.model, "messages": messages},
                headers={"Authorization": f"Bearer {secret}"},
            )
        if answer.status_code != httpx.codes.OK and trace.stop_condition is None:
            return ProgramResult(exit_code=1, stdout="", stderr=answer.text)
        return ProgramResult(exit_code=0, stdout=answer.text, stderr="")


sys.modules[IN_PROCESS] = sys.modules[__name__]


def tasks(task: Task, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a taskset's tasks, as prompts, without the columns that name them."""
    _, listed = _load(task, arguments)
    for number, one in enumerate(listed):
        data = one.data
        answer = getattr(data, "answer", None)
        messages = _messages(data.system_prompt, data.prompt)
        yield {
            "prompt": messages or str(data.description or data.name or f"task {number}"),  # the environment opens it
            "answer": answer if isinstance(answer, str | int | float) else None,
        }


async def run(base_url: str, key_variable: str, task: Task, number: int, arguments: dict[str, Any]) -> float:
    """Play one episode and return its reward: the mean of the traces of agents that are trained, mostly one."""
    key = json.dumps([task, arguments], sort_keys=True)
    async with _loading:
        if key not in _environments:
            environment, listed = _load(task, arguments)
            await _serving.enter_async_context(environment.serving())
            _environments[key] = environment, listed
    environment, listed = _environments[key]
    client = EvalClientConfig(base_url=base_url, api_key_var=key_variable)
    [slot] = environment.slots(listed[number])
    episode = await environment.run_slot(slot, ModelContext(model="student", client=client))
    errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
    if not episode.ok:
        raise RuntimeError(f"{errors[-1].type}: {errors[-1].message}" if errors else "the episode is not ok")
    rewards = [trace.reward for trace in episode.traces if trace.agent.trainable]
    return float(sum(rewards) / len(rewards)) if rewards else math.nan


async def close() -> None:
    """End what the environments serve."""
    await _serving.aclose()


def _load(task: Task, arguments: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Return the environment, and its tasks in order."""
    name, parameters, limit = task
    data = {**arguments, "taskset": {**arguments.get("taskset", {}), **parameters, "id": name}}
    for role in agent_config_fields(env_config_type(name, data.get("id", ""))()):
        local: dict[str, Any] = {"runtime": {"type": "subprocess"}}
        if default_harness_id(name) == "bash":  # the package's default would execute what the student writes
            local["harness"] = {"id": IN_PROCESS}
        data[role] = {**local, **data.get(role, {})}
    environment = load_environment(resolve_env_config(data))
    taskset = environment.taskset
    if limit is None and not taskset.bounded:
        raise ValueError(f"the taskset {name} is infinite; write verifiers:{name}?limit=100")
    return environment, list(taskset if limit is None else taskset.take(limit))


def _messages(system: str | None, prompt: Any) -> list[dict[str, Any]]:
    first = [{"role": "system", "content": system}] if system else []
    if isinstance(prompt, str):
        return [*first, {"role": "user", "content": prompt}]
    return [*first, *(message_to_wire(message) for message in prompt or [])]
