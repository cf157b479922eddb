"""The example of a step hook, through a real run."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.runs import preceptor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SETTINGS = (
    "run.steps=2",
    "run.name=run",
    'run.hooks=["examples.extend.step_hook:StepNotes"]',
    "prompts.prompts_per_step=16",
    "evaluation.num_prompts=4",
    "evaluation.teacher_too=false",
    "checkpoint.export=false",
    "ray.dashboard=false",
)


def test_a_hook_named_in_the_run_file_writes_a_line_per_step_and_adds_a_metric(tmp_path: Path) -> None:
    finished = preceptor("demo", f"run.directory={tmp_path}", *SETTINGS)
    assert finished.code == 0, finished.error
    lines = (tmp_path / "run/steps.txt").read_text().splitlines()
    assert [line.split(": KL ")[0] for line in lines] == ["step 1", "step 2"]
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(record["notes/longest_completion"] <= 48 for record in records)  # the demo's longest completion
    assert f"notes: {tmp_path}/run/steps.txt" in finished.output


def test_a_hook_that_cannot_be_imported_ends_the_command_before_anything_starts(tmp_path: Path) -> None:
    finished = preceptor("demo", f"run.directory={tmp_path}", 'run.hooks=["examples.extend.step_hook:Absent"]')
    assert finished.code == 1
    assert "'examples.extend.step_hook:Absent' as a step hook cannot be imported" in finished.error
    assert not list(tmp_path.iterdir())
