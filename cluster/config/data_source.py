"""Reads what a run file calls its prompts: a file, a folder, a data set of the Hugging Face hub, or a task by name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

import msgspec

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(/[\w.-]+)?")  # owner/name, or owner/name/subset
_FILE_NAME = re.compile(r".*\.(jsonl|ndjson|json|parquet|csv|tsv|txt|gz|zst|zip)", re.IGNORECASE)


@dataclass(frozen=True)
class DataSource:
    """Names prompts: `PLACE[:SPLIT]`, where the place is a file, a folder, or `owner/name[/subset]` of the hub.

    Prompts of an installed package are `PACKAGE:TASK?parameter=value&...`; their place is what follows the colon.
    """

    kind: Literal["file", "folder", "hub", "reasoning-gym", "verifiers"]
    place: str
    subset: str | None = None
    split: str | None = None  # None: the first usual one that there is


def parse_source(text: str) -> DataSource:
    """Return what a text names; what is there as a file or folder is meant, and no hub is asked.

    A folder that is laid out like a data set of the hub takes a subset in the same way.

    Example:
        >>> parse_source("openai/gsm8k/main:train[:100]")
        DataSource(kind='hub', place='openai/gsm8k', subset='main', split='train[:100]')
        >>> parse_source("absent/prompts.jsonl").kind
        'file'
        >>> parse_source("reasoning-gym:chain_sum?size=100")
        DataSource(kind='reasoning-gym', place='chain_sum?size=100', subset=None, split=None)
    """
    package, _, task = text.partition(":")
    if package == "reasoning-gym":
        return DataSource("reasoning-gym", task)
    if package == "verifiers":
        return DataSource("verifiers", task)
    split = ""
    if not _exists(Path(text)):
        text, _, split = text.partition(":")
    path = Path(text)
    if _exists(path):
        return DataSource("folder" if path.is_dir() else "file", text, split=split or None)
    if _FILE_NAME.fullmatch(text):
        return DataSource("file", text)
    if "/" in text and _has_subsets(path.parent):
        return DataSource("folder", str(path.parent), path.name, split or None)
    if not _HUB_ID.fullmatch(text):
        return DataSource("file", text)
    owner, name, *subset = text.split("/")
    return DataSource("hub", f"{owner}/{name}", subset[0] if subset else None, split or None)


def parse_task(text: str) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the parameters of a task; a parameter is JSON, or else a text.

    Example:
        >>> parse_task("chain_sum?size=100&allow_negation=true&name=a")
        ('chain_sum', {'size': 100, 'allow_negation': True, 'name': 'a'})
    """
    name, _, query = text.partition("?")
    return name.strip(), {key: _value(value) for key, value in parse_qsl(query.strip(), keep_blank_values=True)}


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _has_subsets(folder: Path) -> bool:
    readme = folder / "README.md"
    return _exists(readme) and "config_name:" in readme.read_text(encoding="utf-8", errors="replace")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False
