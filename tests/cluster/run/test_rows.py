"""`preceptor rows` on what a run recorded, and on what another kept."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.cli import main
from cluster.config.run_directory import RunDirectory
from cluster.contracts.kept_rows import KeptRowFiles
from tests.cluster.run.recorded import config_of, record_steps


def test_rows_for_which_a_condition_holds_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(record_steps(tmp_path).path)
    assert main(["rows", run, "--where", "reward > 0 and step == 2", "--limit", "2"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["step", "trajectory_id", "prompt_id", "teacher", "completion_tokens", "finish_reason", "reward", "log_ratio"],
        ["2", "7", "23", "main", "4", "stop", "1", "0.3069"],
        ["2", "11", "25", "main", "4", "stop", "1", "0.3069"],
        ["2", "of", "3", "rows,", "for", "which", "reward", ">", "0", "and", "step", "==", "2;", "in", "all", "12"],
    ]


def test_rows_are_written_as_json_with_the_columns_that_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(record_steps(tmp_path).path)
    assert main(["rows", run, "--json", "--columns", "trajectory_id,token_ids", "--where", "trajectory_id < 2"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"trajectory_id": 1, "token_ids": [1, 2, 3, 4]},
        {"trajectory_id": 0, "token_ids": [1, 2, 3]},
    ]


def test_of_a_run_without_a_record_the_kept_rows_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = RunDirectory.create(config_of(tmp_path))
    assert main(["rows", str(directory.path)]) == 1
    assert "it has no rows yet; rollout.record = true records all" in capsys.readouterr().err
    KeptRowFiles(directory.kept_rows).write(3, pa.table({"step": [3], "trajectory_id": [5], "loss": [0.5]}))
    assert main(["rows", str(directory.path)]) == 0
    assert capsys.readouterr().out == "step  trajectory_id\n3     5\n1 of 1 rows; in all 1\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--where", "reward >"], "condition 'reward >': invalid syntax"),
        (["--where", "rewards > 0"], "condition 'rewards > 0': No match for FieldRef.Name(rewards)"),
        (["--where", "teacher > 0"], "condition 'teacher > 0': "),
        (["--columns", "rewards"], "there is no column 'rewards'; there are trajectory_id"),
    ],
)
def test_what_is_no_condition_or_column_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(["rows", str(record_steps(tmp_path).path), *arguments]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert sentence in line
