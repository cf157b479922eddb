"""The packages of trackers are no dependencies: a module that notes its calls stands in for W&B's."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import ConfigError
from cluster.monitoring.observers import StepSample
from cluster.monitoring.trackers import TensorBoardObserver, WandbObserver, check_trackers, open_trackers
from tests.builders import make_config

MODULE = """
calls = []

class Run:
    def log(self, metrics, step):
        calls.append(("log", metrics, step))

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
        check_trackers(make_config("logging.wandb_project=distil"))


@pytest.fixture
def no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed


def test_tensorboard_without_the_package_is_one_sentence(no_tensorboard: None) -> None:
    with pytest.raises(ConfigError, match=r"logging.tensorboard is true, but the package tensorboard is not installed"):
        check_trackers(make_config("logging.tensorboard=true"))


def test_a_run_file_that_names_no_tracker_needs_no_package(tmp_path: Path, no_tensorboard: None) -> None:
    check_trackers(make_config())
    assert open_trackers(make_config(), RunDirectory(tmp_path), first_step=0) == []


def test_tensorboard_reads_back_the_finite_metrics_and_hides_steps_that_are_done_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first, second = (StepSample({"step": step, "kl": 1.0, "bad": math.nan}, [3, 30], [], []) for step in (1, 2))
    observer = TensorBoardObserver(tmp_path / "tensorboard", first_step=0)
    observer.on_step(first)
    observer.on_step(second)
    observer.close("failed")
    resumed = TensorBoardObserver(tmp_path / "tensorboard", first_step=1)
    resumed.on_step(second)
    resumed.close("ended")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0, "scalars": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("kl")] == [(1, 1.0), (2, 1.0)]
    assert "bad" not in events.Tags()["scalars"]
    assert [event.histogram_value.num for event in events.Histograms("rollout/completion_lengths")] == [2, 2]


def test_metrics_go_to_the_project_under_the_runs_name(wandb_calls: list[tuple[object, ...]], tmp_path: Path) -> None:
    config = make_config("logging.wandb_project=distil", "run.name=second")
    check_trackers(config)
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
