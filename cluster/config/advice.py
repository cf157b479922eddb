"""Says what a field of a run file may be, beside msgspec's finding: the names or values that there are, the nearest."""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import msgspec.inspect as inspect

UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
CHOICES = re.compile(r"Invalid (?:enum )?value '(.*)'")
MOST_NAMES = 40  # that a sentence lists


def advice(message: str, path: str, root: type) -> str:
    """Return what the sentence goes on with; "" where msgspec has said it all.

    `path` is msgspec's, without the `$.` before it, and `root` the class that was read.

    Example:
        >>> from cluster.config.run_config import Config
        >>> advice("Object contains unknown field `max_stalenes`", "rollout", Config)
        '; did you mean max_staleness?'
        >>> advice("Invalid enum value 'fp16'", "learner.dtype", Config)
        '; expected one of bfloat16, float32'
    """
    types = list(_types_at(inspect.type_info(root), re.findall(r"[^.\[\]]+|\[\.\.\.\]", path)))
    if unknown := UNKNOWN.search(message):
        return _of_unknown(unknown[1], [name for type_ in types for name in _field_names(type_)], root)
    if CHOICES.search(message):
        values = [str(value) for type_ in types if isinstance(type_, inspect.LiteralType) for value in type_.values]
        return f"; expected one of {', '.join(values)}" if values else ""
    if "`, got `str`" in message and any(isinstance(type_, inspect.FloatType | inspect.IntType) for type_ in types):
        return "; write a number, without quotes"
    if "matching regex" in message:
        return "; use letters, digits, '.', '_' and '-', a letter or digit first"
    if message == "Expected `array`, got `str`":
        return '; write a list: ["..."]'
    return ""


def _of_unknown(name: str, names: list[str], root: type) -> str:
    near = get_close_matches(name, names, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    elsewhere = [path for path in _paths(inspect.type_info(root)) if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return f"; there are {', '.join(names)}" if 0 < len(names) <= MOST_NAMES else ""


def _types_at(type_: Any, path: list[str]) -> Iterator[Any]:
    """Yield the types that a value at a path may have, of all members of unions."""
    for member in _members(type_):
        if not path:
            yield member
        for below in _below(member, path[0]) if path else ():
            yield from _types_at(below, path[1:])


def _members(type_: Any) -> Iterator[Any]:
    if isinstance(type_, inspect.Metadata):
        yield from _members(type_.type)
    elif isinstance(type_, inspect.UnionType):
        for member in type_.types:
            yield from _members(member)
    else:
        yield type_


def _below(type_: Any, name: str) -> list[Any]:
    """Return the types of what has this name inside a value; `name` is `[...]` where it is any."""
    if isinstance(type_, inspect.StructType):
        tags = [inspect.LiteralType((type_.tag,))] if name == type_.tag_field else []
        return tags + [field.type for field in type_.fields if field.encode_name == name]
    if isinstance(type_, inspect.DictType):
        return [type_.value_type]
    return [type_.item_type] if isinstance(type_, inspect.VarTupleType | inspect.ListType) else []


def _field_names(type_: Any) -> list[str]:
    return [field.encode_name for field in type_.fields] if isinstance(type_, inspect.StructType) else []


def _paths(type_: Any, above: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields; what stands in a table of the user's names is under NAME."""
    for one in _types_at(type_, []):
        if isinstance(one, inspect.DictType):
            yield from _paths(one.value_type, f"{above}NAME.")
        for field in one.fields if isinstance(one, inspect.StructType) else ():
            yield f"{above}{field.encode_name}"
            yield from _paths(field.type, f"{above}{field.encode_name}.")
