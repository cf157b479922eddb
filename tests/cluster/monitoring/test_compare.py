import json
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import TrainingError
from cluster.contracts.files import RecordsFile
from cluster.monitoring.compare import compare
from cluster.monitoring.status_file import KeptStatus, change_status
from tests.builders import make_config


def make_run(folder: Path, name: str, accuracies: dict[int, float], *overrides: str, error: str = "") -> Path:
    """Write the directory of a run whose step k took k seconds, with 100 tokens a second and a KL of 1/k."""
    directory = RunDirectory.create(make_config(f"run.directory={folder}", f"run.name={name}", *overrides))
    try:
        with KeptStatus(directory.status, steps=20):
            for step in range(1, 1 + max(accuracies, default=0)):
                record: dict[str, Any] = {"step": step, "step/seconds": float(step), "train/kl": 1.0 / step}
                held_out = {"held_out/accuracy": accuracies[step]} if step in accuracies else {}
                record |= {"step/tokens_per_second": 100.0, "completion_tokens": 100 * step, **held_out}
                record["train/peak_memory_gib"] = 1.0 + step
                RecordsFile(directory.metrics).write(record)
            change_status(directory.status, started_at=1000.0, state="running")
            if error:
                raise TrainingError(error)
    except TrainingError:
        pass
    change_status(directory.status)
    return directory.path


def test_settings_that_differ_and_the_outcome_stand_side_by_side(tmp_path: Path) -> None:
    first = make_run(tmp_path, "first", {2: 0.5, 4: 0.75}, "learner.learning_rate=1e-5")
    second = make_run(tmp_path, "second", {2: 0.25, 4: 0.5, 6: 0.4}, "learner.learning_rate=2e-5", "run.seed=1")
    found = compare([first, second])
    assert found.runs == ["first", "second"]
    assert found.settings == {"run.seed": [0, 1], "learner.learning_rate": [1e-5, 2e-5]}
    outcome = found.outcome
    assert outcome["state"] == ["ended", "ended"]
    assert outcome["steps"] == [4, 6]
    assert outcome["held-out accuracy, last"] == [0.75, 0.4]
    assert outcome["held-out accuracy, best"] == [0.75, 0.5]
    assert outcome["held-out accuracy after step 4"] == [0.75, 0.5]
    assert outcome["step seconds, median"] == [2.5, 3.5]
    assert outcome["seconds of all steps"] == [10.0, 21.0]
    assert outcome["completion tokens"] == [1000.0, 2100.0]
    assert outcome["learner's peak memory, GiB"] == [5.0, 7.0]
    assert outcome["KL per token, last 10 steps"][0] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert not {"error", "held-out KL, last"} & outcome.keys()  # no run says


def test_an_empty_run_and_one_that_failed_are_shown_as_far_as_they_came(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [
        make_run(tmp_path, "done", {2: 0.5}),
        make_run(tmp_path, "failed", {1: 0.25}, error="the loss is infinite"),
    ]
    RunDirectory.create(make_config(f"run.directory={tmp_path}", "run.name=empty"))
    assert main(["compare", *map(str, paths), str(tmp_path / "empty")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "the same settings" in lines

    def cells(label: str) -> list[str]:
        [row] = [line for line in lines if label in line]
        return [cell.strip() for cell in row.strip("│").split("│")][1:]

    assert cells("state") == ["ended", "failed", "unknown"]
    assert cells("error") == ["-", "the loss is infinite", "-"]
    assert cells("│ steps ") == ["2", "1", "0"]
    assert cells("held-out accuracy, last") == ["0.5", "0.25", "-"]


def test_json_has_every_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [make_run(tmp_path / folder, "run", {1: 0.5}) for folder in ("a", "b")]
    assert main(["compare", *map(str, paths), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["runs"] == [str(path) for path in paths]  # the names are the same
    assert shown["settings"] == {}
    assert shown["outcome"]["held-out accuracy, last"] == [0.5, 0.5]


def test_other_prompts_in_a_file_of_the_same_name_are_a_difference(tmp_path: Path) -> None:
    paths = [make_run(tmp_path, name, {}) for name in ("a", "b")]
    for path, checksum in zip(paths, ("1f", "2f"), strict=True):
        (path / "prompts.json").write_text(json.dumps({"num_train": 3, "num_held_out": 1, "checksum": checksum}))
    assert compare(paths).settings == {"prompts (checksum)": ["1f", "2f"]}


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("config.json", "[]", "not a run's configuration"),
        ("prompts.json", "[]", "not a record of prompts"),
        ("metrics.jsonl", "{}\n{}\n", "not a record of a step"),
    ],
)
def test_a_damaged_file_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str, sentence: str
) -> None:
    paths = [make_run(tmp_path, name, {}) for name in ("a", "b")]
    (paths[1] / file).write_text(text)
    assert main(["compare", *map(str, paths)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"preceptor: {paths[1] / file}")
    assert sentence in error


def test_one_run_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(make_run(tmp_path, "a", {}))]) == 1
    assert "takes two run directories or more" in capsys.readouterr().err
