from collections import Counter
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import ActorError, LearnerDiedError
from cluster.monitoring.sinks import PlainView
from cluster.run import supervisor
from cluster.run.hooks import Hooks, RunContext, StepHook
from cluster.run.summary import RunSummary
from cluster.run.supervisor import Supervisor
from tests.builders import make_config

DEATHS = 2


def test_every_attempt_has_hooks_of_its_own_and_only_the_first_restores_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[RunContext] = []

    def train(run: RunContext, hooks: Hooks) -> None:
        if len(attempts) <= DEATHS:
            raise LearnerDiedError("learner-0 died")

    def make_hooks(run: RunContext) -> list[StepHook]:
        attempts.append(run)
        return []

    monkeypatch.setattr(supervisor, "train", train)
    calls = Counter[str]()
    pipeline: Any = SimpleNamespace(
        teachers=SimpleNamespace(abandon=lambda: calls.update(["teachers abandon"])),
        learner=SimpleNamespace(start_again=lambda: calls.update(["learner starts again"])),
        rollouts=SimpleNamespace(abandon=lambda: calls.update(["rollouts abandon"])),
    )
    config = make_config(f"ray.max_restarts={DEATHS}")
    inputs: Any = None
    directory = RunDirectory(tmp_path)
    Supervisor(config, inputs, pipeline, directory, PlainView(), Event(), make_hooks).train(RunSummary())
    assert [run.is_first_attempt for run in attempts] == [True, False, False]
    # Else trajectories of the steps that are done again would come twice.
    assert calls == dict.fromkeys(["teachers abandon", "learner starts again", "rollouts abandon"], DEATHS)


@pytest.mark.parametrize(("steps_done", "attempts"), [((0, 0), 2), ((0, 3, 3), 3)])
def test_a_learner_that_dies_of_the_same_error_at_the_same_step_is_not_started_again(
    steps_done: tuple[int, ...], attempts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[RunContext] = []

    def train(run: RunContext, hooks: Hooks) -> None:
        run.ledger.finished_step = steps_done[len(made) - 1]
        died = LearnerDiedError("learner-0 died")
        died.last_error = "RuntimeError: no kernel takes this step"
        raise died

    def make_hooks(run: RunContext) -> list[StepHook]:
        made.append(run)
        return []

    monkeypatch.setattr(supervisor, "train", train)
    nothing = SimpleNamespace(abandon=lambda: None, start_again=lambda: None)
    pipeline: Any = SimpleNamespace(teachers=nothing, learner=nothing, rollouts=nothing)
    inputs: Any = None
    again = Supervisor(
        make_config("ray.max_restarts=9"), inputs, pipeline, RunDirectory(tmp_path), PlainView(), Event(), make_hooks
    )
    with pytest.raises(ActorError, match=r"the learner is not started again, for it died of the same .* --resume "):
        again.train(RunSummary())
    assert len(made) == attempts
