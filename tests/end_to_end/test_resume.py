"""A run that goes on from any of its checkpoints does the same steps again, on the same real pools."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.commands import step_hooks
from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.demo import embedded_config
from cluster.placement.placement import cluster_nodes, plan_placement
from cluster.run.checkpoints import find_resume_point
from cluster.run.driver import train
from cluster.run.hooks import Hooks
from cluster.run.inputs import Inputs, load_inputs
from cluster.run.ledger import LedgerRecord, audit, read_ledger
from cluster.run.pools import Pipeline, start_pipeline
from learner.checkpointing.checkpoint import step_folder
from tests.cluster.run.contexts import make_run_context
from tests.end_to_end.later_versions import LaterVersions

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(600)]

STEPS = 5
PROMPTS_PER_STEP = 16
RESUMED_FROM = (1, 3, 4)
SETTINGS = (
    f"run.steps={STEPS}",
    "run.name=undisturbed",
    f"prompts.prompts_per_step={PROMPTS_PER_STEP}",
    "rollout.rows_per_batch=4",
    "learner.warmup_steps=2",
    "evaluation.num_prompts=4",
    "evaluation.every_steps=2",
    "evaluation.teacher_too=false",
    "checkpoint.every_steps=1",
    f"checkpoint.keep_last={STEPS}",
    "checkpoint.export=false",
    "ray.dashboard=false",
)


def resume(config: Config, inputs: Inputs, pipeline: Pipeline, directory: RunDirectory) -> None:
    """Do as `preceptor train --resume` does, in pools that run already."""
    state = find_resume_point(directory, config, pytest.fail)
    run = make_run_context(config, inputs, pipeline, directory, state.step, state.history)
    hooks = Hooks(step_hooks(run))
    run.ledger.check(state.ledger)
    pipeline.learner.load_checkpoint(step_folder(directory.checkpoints, state.step))
    train(run, hooks)


def copy_until(directory: RunDirectory, step: int, path: Path) -> RunDirectory:
    """Return a copy of a run that was killed some time after its checkpoint of `step`."""
    shutil.copytree(directory.path, path)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(path / "checkpoints" / f"step-{later}")
    half_written = path / "checkpoints" / f"step-{step + 1}.partial"
    half_written.mkdir()
    (half_written / "rank-0.safetensors").write_bytes(b"half")
    with (path / "ledger.jsonl").open("a") as ledger:
        ledger.write('{"step": 6, "traj')  # a line that the crash cut short
    return RunDirectory.open(path)


@pytest.fixture(scope="module")
def runs(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[int, RunDirectory]:
    """Train undisturbed (0), then again from some of the checkpoints (their steps)."""
    folder = tmp_path_factory.mktemp("resume")
    config = embedded_config([*SETTINGS, f"run.directory={folder}"])
    inputs = load_inputs(config)
    directories = {0: RunDirectory.create(config)}
    with start_pipeline(config, inputs, plan_placement(config, cluster_nodes())) as started:
        learner: Any = LaterVersions(started.learner)
        pipeline = replace(started, learner=learner)
        run = make_run_context(config, inputs, pipeline, directories[0])
        train(run, Hooks(step_hooks(run)))
        for step in RESUMED_FROM:
            directories[step] = copy_until(directories[0], step, folder / f"from-{step}")
            resume(config, inputs, pipeline, directories[step])
    return directories


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def consumed(directory: RunDirectory) -> list[tuple[Any, ...]]:
    """Return what every step learned from; the versions of this test's resumed runs go on from those before."""

    def of(record: LedgerRecord) -> tuple[Any, ...]:
        return record.step, record.trajectory_ids, record.prompt_ids, record.seeds_checksum

    return [of(record) for record in read_ledger(directory.ledger)]


@pytest.mark.parametrize("step", RESUMED_FROM)
def test_a_resumed_run_learns_from_the_same_trajectories(runs: dict[int, RunDirectory], step: int) -> None:
    assert len(consumed(runs[0])) == STEPS
    assert consumed(runs[step]) == consumed(runs[0])


@pytest.mark.parametrize("step", RESUMED_FROM)
def test_a_resumed_run_has_the_same_losses(runs: dict[int, RunDirectory], step: int) -> None:
    undisturbed, resumed = records(runs[0].metrics), records(runs[step].metrics)
    assert [record["step"] for record in resumed] == list(range(1, STEPS + 1))
    for first, again in zip(undisturbed[step:], resumed[step:], strict=True):
        assert again["completion_tokens"] == first["completion_tokens"]
        assert again["train/learning_rate"] == first["train/learning_rate"]
        assert again["train/loss"] == pytest.approx(first["train/loss"], abs=1e-4)


@pytest.mark.parametrize("step", RESUMED_FROM)
def test_a_resumed_run_shows_each_evaluation_once(runs: dict[int, RunDirectory], step: int) -> None:
    def shown(directory: RunDirectory) -> list[tuple[int, int]]:
        return [(sample["step"], sample["trajectory_id"]) for sample in records(directory.samples)]

    assert len(shown(runs[0])) == 4 * 4  # of 4 prompts before training, after steps 2 and 4, and at the end
    assert shown(runs[step]) == shown(runs[0])


@pytest.mark.parametrize("step", RESUMED_FROM)
def test_a_resumed_run_leaves_only_whole_checkpoints(runs: dict[int, RunDirectory], step: int) -> None:
    expected = [f"step-{number}" for number in range(1, STEPS + 1)]
    assert sorted(path.name for path in runs[step].checkpoints.iterdir()) == expected


def test_the_ledger_shows_every_prompt_position_once(runs: dict[int, RunDirectory]) -> None:
    config = runs[0].read_config()
    inputs = load_inputs(config)
    assert audit(read_ledger(runs[0].ledger), config, inputs.train) == STEPS * PROMPTS_PER_STEP
