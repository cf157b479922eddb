"""Weights & Biases is no dependency, so a module of its name that notes its calls stands in for it."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import ConfigError
from cluster.monitoring.observers import StepSample
from cluster.monitoring.wandb import WandbObserver, check_wandb
from tests.builders import make_config

MODULE = """
calls = []

class Run:
    def log(self, figures, step):
        calls.append(("log", figures, step))

    def finish(self, exit_code):
        calls.append(("finish", exit_code))

def init(**arguments):
    calls.append(("init", arguments))
    return Run()
"""


@pytest.fixture
def wandb_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[object, ...]]]:
    (tmp_path / "wandb.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import wandb

    yield wandb.calls
    del sys.modules["wandb"]


def test_a_project_without_the_package_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"logging.wandb_project is 'distil', but the package wandb is not installed"):
        check_wandb(make_config("logging.wandb_project=distil"))


def test_without_a_project_nothing_is_asked_for() -> None:
    check_wandb(make_config())


def test_figures_go_to_the_project_under_the_runs_name(wandb_calls: list[tuple[object, ...]], tmp_path: Path) -> None:
    config = make_config("logging.wandb_project=distil", "run.name=second")
    check_wandb(config)
    observer = WandbObserver(config, RunDirectory(tmp_path))
    observer.on_step(StepSample({"step": 3, "train/kl": 0.5, "train/loss": math.nan}, [], [], []))
    observer.close("failed")
    (_, arguments), logged, finished = wandb_calls
    assert (arguments["project"], arguments["name"], arguments["resume"]) == ("distil", "second", "allow")
    assert arguments["config"]["run"]["name"] == "second"
    assert logged == ("log", {"step": 3, "train/kl": 0.5}, 3)
    assert finished == ("finish", 1)


def test_a_resumed_run_goes_on_as_itself_and_not_as_its_namesake(wandb_calls: list[tuple[object, ...]]) -> None:
    config = make_config("logging.wandb_project=distil")
    for folder in ("a/run", "b/run", "a/run"):
        WandbObserver(config, RunDirectory(Path(folder)))
    first, other, resumed = (arguments["id"] for _, arguments in wandb_calls)
    assert first == resumed != other
