"""Plays environments of the package `verifiers` as harnesses: their rewards, their answers, their data.

`program.py` loads this file by its path, in the Python that has the package; it imports nothing of ours but the file
beside it, which is for the package from 0.4 on. In releases before, a module's `load_environment` makes an environment.

`prompts.train = "verifiers:NAME?parameter=value&limit=100"` names a taskset or such a module. `environment.arguments`
is what the package calls `[env]`, or further arguments of `load_environment`.
"""

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

TASK, NUMBER = "verifiers_task", "verifiers_number"  # columns of the prompts
V1 = "verifiers_v1"

_keys = count()
_environments: dict[str, tuple[Any, Any]] = {}  # of `load_environment`, with their data, by what the run file says


def tasks(task: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of an environment's data, as prompts."""
    rows = _classic_tasks(task, arguments) if _is_classic(task) else _v1().tasks(named(task), arguments)
    for number, row in enumerate(rows):
        yield {**row, "domain": named(task)[0], TASK: task, NUMBER: number}


async def run(base_url: str, api_key: str, prompt: dict[str, Any], **arguments: Any) -> float:
    """Play one episode and return its reward; raise what the package says of one that failed."""
    task, number = prompt["columns"][TASK], prompt["columns"][NUMBER]
    variable = f"PRECEPTOR_API_KEY_{next(_keys)}"  # the package reads keys from variables, and hides this name's
    os.environ[variable] = api_key
    try:
        if _is_classic(task):
            return await _run_classic(base_url, variable, task, number, arguments)
        return float(await _v1().run(base_url, variable, named(task), number, arguments))
    finally:
        del os.environ[variable]


async def close_harness() -> None:
    """End what the environments serve; `program.py` calls this before its process ends."""
    if V1 in sys.modules:
        await sys.modules[V1].close()


def named(task: str) -> tuple[str, dict[str, Any], int | None]:
    """Return what a source of prompts names: an environment, its parameters, and how many of its tasks."""
    name, _, query = task.partition("?")
    parameters = {key: _value(value) for key, value in parse_qsl(query)}
    return name, parameters, parameters.pop("limit", None)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _is_classic(task: str) -> bool:
    """Return whether a module's `load_environment` makes the environment."""
    name = named(task)[0].rsplit("/", 1)[-1].replace("-", "_")
    try:
        return hasattr(importlib.import_module(name), "load_environment")
    except ModuleNotFoundError:
        return False  # the package says where it looks


def _classic(task: str, arguments: Mapping[str, Any]) -> tuple[Any, Any]:
    key = json.dumps([task, arguments], sort_keys=True)
    if key not in _environments:
        name, parameters, limit = named(task)
        is_evaluation = parameters.pop("evaluation", False)
        environment = importlib.import_module("verifiers").load_environment(name, **{**arguments, **parameters})
        select = environment.get_eval_dataset if is_evaluation else environment.get_dataset
        _environments[key] = environment, select(limit or -1)
    return _environments[key]


def _classic_tasks(task: str, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for row in _classic(task, arguments)[1]:
        answer = row.get("answer")
        prompt = row["prompt"]
        if not isinstance(prompt, str):  # a table gives all messages the same keys
            prompt = [{name: value for name, value in one.items() if value is not None} for one in prompt]
        yield {"prompt": prompt, "answer": answer if isinstance(answer, str | int | float) else None}


async def _run_classic(base_url: str, key_variable: str, task: str, number: int, arguments: Mapping[str, Any]) -> float:
    environment, data = _classic(task, arguments)
    types = importlib.import_module("verifiers.types")
    client = types.ClientConfig(api_key_var=key_variable, api_base_url=base_url)
    output = await environment.run_rollout(data[number], client, "student", {})
    if output["error"]:
        raise RuntimeError(str(output["error"]))
    return float(output["reward"])


def _v1() -> ModuleType:
    if V1 not in sys.modules:
        spec = importlib.util.spec_from_file_location(V1, Path(__file__).with_name(f"{V1}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[V1] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[V1]
            raise
    return sys.modules[V1]
