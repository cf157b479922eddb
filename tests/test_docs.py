"""Every file and every program that README and the documents name is there."""

import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = "benchmarks|cluster|docs|examples|learner|rollout_workers|teacher_workers|tests"
PATH = re.compile(rf"(?<![\w/.-])(?:{TOP}|\.github|\.ci)(?:/[\w.-]+)*/[\w.-]*")
MODULE = re.compile(rf"python -m ((?:{TOP})[\w.]*)")
FILE = re.compile(r"`(\w+\.(?:py|toml))`")
# Not CHANGELOG.md: it names files by the names that they had.
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md*"), *(ROOT / "examples").rglob("*.md")]
)


def paths_in(text: str) -> Iterator[str]:
    """Yield the paths below a top-level folder, without the places of names that differ from run to run.

    Example:
        >>> list(paths_in("see `cluster/cli.py`, docs/gpu.md. Not runs/run or benchmarks/results/DATE-gpu.json"))
        ['cluster/cli.py', 'docs/gpu.md']
    """
    for path in PATH.findall(text):
        if not re.search(r"[A-Z]{4}", path) or path.endswith("README.md"):
            yield path.rstrip(".")


@cache
def file_names() -> set[str]:
    """Return the names of all files below the top-level folders."""
    return {path.name for folder in TOP.split("|") for path in (ROOT / folder).rglob("*.*")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_that_a_document_names_exists(document: Path) -> None:
    missing = {path for path in paths_in(document.read_text(encoding="utf-8")) if not (ROOT / path).exists()}
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_document_names_without_its_folder_exists(document: Path) -> None:
    missing = set(FILE.findall(document.read_text(encoding="utf-8"))) - file_names()
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_program_that_a_document_names_can_be_run(document: Path) -> None:
    modules = {name.rstrip(".") for name in MODULE.findall(document.read_text(encoding="utf-8"))}
    assert not {name for name in modules if importlib.util.find_spec(name) is None}
