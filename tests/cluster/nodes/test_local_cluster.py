"""Starts of a local cluster that fail; those that succeed are everywhere else."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster.contracts.errors import PlacementError
from cluster.nodes import local_cluster as module
from cluster.nodes.local_cluster import local_cluster

TIMED_OUT = Exception(
    "The current node timed out during startup. This could happen because some of the raylet failed to startup."
)
STARTED = SimpleNamespace(address_info={"gcs_address": "127.0.0.1:1", "webui_url": ""})


def answering(answers: Iterator[Any], folders: list[Path]) -> Callable[..., Any]:
    """Stand for `ray.init`, which returns or raises what comes next, and note where each cluster would write."""

    def init(_temp_dir: str, **arguments: Any) -> Any:
        folders.append(Path(_temp_dir).parent)
        assert [folder.exists() for folder in folders] == [False] * (len(folders) - 1) + [True]
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return init


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    # Another test's cluster may be up in this process, which is to keep the token that it was entered with.
    monkeypatch.setattr(module, "_reload_authentication", lambda: None)
    return []


def test_a_cluster_that_does_not_start_in_time_is_started_once_more(
    monkeypatch: pytest.MonkeyPatch, folders: list[Path]
) -> None:
    monkeypatch.setattr(ray, "init", answering(iter([TIMED_OUT, STARTED]), folders))
    with local_cluster() as cluster:
        assert cluster.folder == folders[1]
    assert not any(folder.exists() for folder in folders)


def test_one_that_never_starts_is_one_sentence(monkeypatch: pytest.MonkeyPatch, folders: list[Path]) -> None:
    monkeypatch.setattr(ray, "init", answering(iter([TIMED_OUT, TIMED_OUT]), folders))
    with (
        pytest.raises(PlacementError, match=r"did not start, twice: The current node timed out during startup; see"),
        local_cluster(),
    ):
        pass
    assert not any(folder.exists() for folder in folders)


def test_other_errors_are_nobodys_but_rays(monkeypatch: pytest.MonkeyPatch, folders: list[Path]) -> None:
    monkeypatch.setattr(ray, "init", answering(iter([ValueError("no such argument")]), folders))
    with pytest.raises(ValueError, match="no such argument"), local_cluster():
        pass
    assert len(folders) == 1
