import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import main


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "absent.toml"], "preceptor: absent.toml: cannot read the run file: No such file or directory"),
        (["train"], "preceptor: no run file given; usage: preceptor train RUN.toml [section.field=value ...]"),
        (["train", "--resume", "absent"], "preceptor: absent: holds no run (there is no config.json)"),
        (["train", "x.toml", "--resume", "y"], "preceptor: --resume takes the run's own configuration; remove x.toml"),
    ],
)
def test_an_error_is_one_sentence_and_a_failure(
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert capsys.readouterr().err == sentence + "\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("override", ["run.steps=0", "--run.steps=0"])
def test_an_override_may_have_dashes_as_in_other_programs(
    override: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text('student.model = "a"\nteachers.t.model = "b"\nprompts.train = "c"\n')
    assert main(["train", str(run_file), override]) == 1
    assert capsys.readouterr().err == f"preceptor: {run_file}: run.steps: Expected `int` >= 1\n"


def test_help_names_every_command() -> None:
    output = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(command in output for command in ("train", "eval", "check", "demo", "submit", "follow", "stop"))


def test_the_console_script_finds_what_a_run_file_names_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "my_hooks.py").write_text("class Mine: ...\n")
    (tmp_path / "run.toml").write_text(
        'student.model = "./absent"\nteachers.t.model = "./absent"\nprompts.train = "absent.jsonl"\n'
        'run.hooks = ["my_hooks:Mine"]\n'
    )
    script = Path(sys.executable).with_name("preceptor")
    run = subprocess.run([script, "train", "run.toml"], capture_output=True, text=True, cwd=tmp_path)
    assert "my_hooks" not in run.stderr
    assert "absent" in run.stderr  # hooks are imported first, then the inputs are read
