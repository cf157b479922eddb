from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import LearnerDiedError
from cluster.monitoring.sinks import PlainView
from cluster.nodes.interruption import StopRequest
from cluster.run import supervisor
from cluster.run.checkpoints import RunSummary
from cluster.run.supervisor import Beginning, Supervisor
from tests.builders import make_config

DEATHS = 2


class ScriptedRun:
    """Notes what is asked of a training run."""

    def __init__(self, begun: list[list[str]]) -> None:
        self.observers = nullcontext()
        self.history = RunSummary()
        self.asked: list[str] = []
        begun.append(self.asked)

    def restore_pools(self) -> None:
        self.asked.append("restore_pools")


def test_pools_get_the_sizes_of_an_earlier_driver_once_and_keep_their_own_over_rewinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[list[str]] = []

    def train(run: ScriptedRun) -> None:
        run.asked.append("train")
        if len(begun) <= DEATHS:
            raise LearnerDiedError("learner-0 died")

    monkeypatch.setattr(supervisor, "TrainingRun", lambda *_: ScriptedRun(begun))
    monkeypatch.setattr(supervisor, "train", train)
    pool = SimpleNamespace(abandon=lambda: None, start_again=lambda: None)
    pipeline: Any = SimpleNamespace(teachers=pool, learner=pool, rollouts=pool)
    config = make_config(f"ray.max_restarts={DEATHS}")
    inputs: Any = None
    said = PlainView()
    Supervisor(config, inputs, pipeline, said, StopRequest()).train(Beginning(RunDirectory(tmp_path), RunSummary()))
    assert begun == [["restore_pools", "train"], ["train"], ["train"]]
