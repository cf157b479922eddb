"""Reads the tool calls in a completion, and the schemas of tools from the functions that they are."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cluster.contracts.errors import ConfigError
from cluster.contracts.import_path import is_import_path, load_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Call = Mapping[str, Any]  # "name" and "arguments"; or "error", of what is no call
ReadCalls = Callable[[str], list[Call]]  # of a completion's text; none: it is an answer

_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


def hermes_calls(text: str) -> list[Call]:
    """Return the calls between `<tool_call>` and `</tool_call>`, as Hermes and Qwen models write them.

    Example:
        >>> hermes_calls('I add: <tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>')
        [{'name': 'add', 'arguments': {'a': 1, 'b': 2}}]
    """
    return [_call(body) for body in _TAGGED.findall(text)]


def json_calls(text: str) -> list[Call]:
    """Return the call that a completion is if it is a JSON object, or list of objects, and nothing else.

    Example:
        >>> json_calls('{"name": "add", "parameters": {"a": 1, "b": 2}}'), json_calls("3")
        ([{'name': 'add', 'arguments': {'a': 1, 'b': 2}}], [])
    """
    stripped = text.strip()
    if not stripped.startswith(("{", "[{")):
        return []
    try:
        decoded = json.loads(stripped)
    except ValueError as error:
        return [{"error": f"the call is not JSON: {error}"}]
    return [_checked(one) for one in (decoded if isinstance(decoded, list) else [decoded])]


FORMATS: dict[str, ReadCalls] = {"hermes": hermes_calls, "json": json_calls}


def reader_of(name: str, tokenizer: "PreTrainedTokenizerBase | None" = None) -> ReadCalls:
    """Return what reads calls in a format of ours, or else with vLLM's tool parser of that name.

    Raises:
        ConfigError: there is no such format.
    """
    if name in FORMATS:
        return FORMATS[name]
    try:
        from vllm.tool_parsers import ToolParserManager

        parser = ToolParserManager.get_tool_parser(name)
    except (ImportError, KeyError) as error:
        raise ConfigError(
            f"environment.tool_format is '{name}'; expected {', '.join(FORMATS)} or a name of vLLM's tool parsers"
        ) from error
    return lambda text: _read_with(parser, text, tokenizer)


def _read_with(parser: Any, text: str, tokenizer: Any) -> list[Call]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    request = ChatCompletionRequest(messages=[], model="student")
    extracted = parser(tokenizer).extract_tool_calls(text, request)
    return [
        _call(f'{{"name": {json.dumps(call.function.name)}, "arguments": {call.function.arguments or "{}"}}}')
        for call in extracted.tool_calls
    ]


def _call(body: str) -> Call:
    try:
        return _checked(json.loads(body))
    except ValueError as error:
        return {"error": f"the call is not JSON: {error}"}


def _checked(decoded: Any) -> Call:
    if not isinstance(decoded, dict) or not isinstance(decoded.get("name"), str):
        return {"error": 'the call is no object with "name" and "arguments"'}
    arguments = decoded.get("arguments", decoded.get("parameters", {}))
    if not isinstance(arguments, dict):
        return {"error": f"the arguments of {decoded['name']} are no object"}
    return {"name": decoded["name"], "arguments": arguments}


@lru_cache(maxsize=8)
def tool_schemas(paths: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the JSON schemas of functions by their import paths, from their signatures and docstrings.

    Raises:
        ConfigError: a function cannot be imported or described, or two have the same name.
    """
    from transformers.utils import get_json_schema

    schemas = []
    for path in paths:
        if not is_import_path(path):
            raise ConfigError(f"environment.tools names '{path}'; expected package.module:function")
        try:
            schemas.append(get_json_schema(load_object(path, "a tool")))
        except ConfigError:
            raise
        except Exception as error:  # transformers' parsers raise their own, and what the function's types make them
            raise ConfigError(
                f"environment.tools: {path} has no schema: {error}; it needs type hints and a docstring with Args"
            ) from error
    names = [schema["function"]["name"] for schema in schemas]
    if len(set(names)) < len(names):
        raise ConfigError(f"environment.tools: two tools have the same name: {', '.join(sorted(names))}; rename one")
    return schemas


def names_of(paths: Iterable[str]) -> dict[str, str]:
    """Return the tools' import paths by the names that models call them by."""
    return {path.rpartition(":")[2]: path for path in paths}
