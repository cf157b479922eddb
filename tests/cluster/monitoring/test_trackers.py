"""The packages of trackers are no dependencies: a module that notes its calls stands in for W&B's."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import ConfigError
from cluster.contracts.kept_rows import KeptRowFiles
from cluster.monitoring.observers import Observers, StepObserver, StepSample
from cluster.monitoring.trackers import TensorBoardTracker, WandbTracker, check_trackers, open_trackers
from tests.builders import make_config
from tests.cluster.report.support import make_rows

MODULE = """
calls = []

class Table:
    def __init__(self, columns, data):
        self.columns, self.data = columns, data

class Run:
    def log(self, metrics, step):
        calls.append(("log", metrics, step))

    def finish(self, exit_code=None):
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


@pytest.fixture
def trackio_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[object, ...]]]:
    (tmp_path / "trackio.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import trackio

    yield trackio.calls
    del sys.modules["trackio"]


def test_a_trackio_project_without_the_package_is_one_sentence() -> None:
    with pytest.raises(
        ConfigError, match=r"logging.trackio_project is 'mine', but the package trackio is not installed"
    ):
        check_trackers(make_config("logging.trackio_project=mine"))


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
    first, second = (StepSample({"step": step, "kl": 1.0, "bad": math.nan}, [3, 30], [], []) for step in (1, 2))
    observer = TensorBoardTracker(tmp_path / "tensorboard", first_step=0)
    observer.on_step(first)
    observer.on_step(second)
    observer.close("failed")
    resumed = TensorBoardTracker(tmp_path / "tensorboard", first_step=1)
    resumed.on_step(second)
    resumed.close("ended")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0, "scalars": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("kl")] == [(1, 1.0), (2, 1.0)]
    assert "bad" not in events.Tags()["scalars"]
    assert [event.histogram_value.num for event in events.Histograms("rollout/completion_lengths")] == [2, 2]


def test_metrics_go_to_the_project_under_the_runs_name(wandb_calls: list[tuple[object, ...]], tmp_path: Path) -> None:
    config = make_config("logging.wandb_project=distil", "run.name=second")
    check_trackers(config)
    observer = WandbTracker(config, RunDirectory(tmp_path))
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
        WandbTracker(config, RunDirectory(Path(folder)))
    first, other, resumed = (arguments["id"] for _, arguments in wandb_calls)
    assert first == resumed != other


def test_trackio_gets_the_metrics_under_the_runs_name(trackio_calls: list[tuple[object, ...]], tmp_path: Path) -> None:
    config = make_config("logging.trackio_project=mine", "run.name=second", "logging.tensorboard=false")
    check_trackers(config)
    [observer] = open_trackers(config, RunDirectory(tmp_path), first_step=0)
    observer.on_step(StepSample({"step": 3, "train/kl": 0.5, "train/loss": math.nan}, [], [], []))
    observer.close("ended")
    (_, arguments), logged, finished = trackio_calls
    assert (arguments["project"], arguments["name"], arguments["resume"]) == ("mine", "second", "allow")
    assert logged == ("log", {"train/kl": 0.5}, 3)
    assert finished == ("finish", None)


def keep_rows(directory: RunDirectory, step: int) -> None:
    columns = {"reward": pa.array([1.0], pa.float32()), "log_ratio": pa.array([0.25], pa.float32())}
    KeptRowFiles(directory.kept_rows).write(step, make_rows(step, [["2+", "2?", "fo", "ur"]], **columns))


def do_steps(directory: RunDirectory, observers: list[StepObserver], steps: int) -> None:
    for step in range(1, steps + 1):
        for observer in observers:
            observer.on_step(StepSample({"step": step}, [], [], []))
        keep_rows(directory, step)  # beside the loop, so that they come later


def test_all_trackers_get_the_newest_rows_every_so_many_steps(
    wandb_calls: list[tuple[Any, ...]], trackio_calls: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    projects = ("logging.wandb_project=w", "logging.trackio_project=t", "logging.tensorboard=true")
    directory = RunDirectory(tmp_path)
    observers = open_trackers(make_config(*projects, "logging.sample_table_steps=2"), directory, first_step=0)
    do_steps(directory, observers, 5)
    for observer in observers:
        observer.close("ended")
    for calls in (wandb_calls, trackio_calls):
        tables = [(logged["samples"], step) for _, logged, step in calls[1:-1] if "samples" in logged]
        assert [(table.data, step) for table, step in tables] == [
            ([[1, "2+2?", "four", 1.0, 0.25]], 2),
            ([[3, "2+2?", "four", 1.0, 0.25]], 4),
        ]
        assert tables[0][0].columns == ["step", "prompt", "completion", "reward", "KL"]
    events = EventAccumulator(str(directory.tensorboard), size_guidance={"tensors": 0}).Reload()
    shown = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")]
    assert [text.splitlines()[2] for text in shown] == [
        "| 1 | 2+2? | four | 1 | 0.25 |",
        "| 3 | 2+2? | four | 1 | 0.25 |",
    ]


def test_no_text_goes_to_a_tracker_unless_it_is_asked_for(wandb_calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    config = make_config("logging.wandb_project=w", "logging.tensorboard=false")
    do_steps(directory, open_trackers(config, directory, first_step=0), 4)
    assert not [logged for _, logged, *_ in wandb_calls if "samples" in logged]


def test_rows_that_cannot_be_read_cost_the_tables_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = RunDirectory(tmp_path)
    config = make_config("logging.tensorboard=true", "logging.sample_table_steps=1")
    observers = Observers(open_trackers(config, directory, first_step=0))
    keep_rows(directory, 1)
    next(directory.kept_rows.iterdir()).write_bytes(b"no rows")
    for step in (1, 2):
        observers.on_step(StepSample({"step": step}, [], [], []))
    observers.close(None)
    [warning] = caplog.messages
    assert warning.startswith("SampleTables: ")
    assert warning.endswith("remove the file; the run goes on without it")
