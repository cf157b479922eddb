"""Wrong run files and overrides end in one sentence, read directly and through the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.config.run_directory import RunDirectory
from cluster.config.run_file import load_run_config
from cluster.contracts.errors import ConfigError
from tests.malformed.refusal import SECONDS_PER_CASE, assert_refused, assert_sentence
from tests.malformed.run_file_cases import GOOD, OVERRIDES, RESUMED, RUN_FILES

pytestmark = pytest.mark.timeout(SECONDS_PER_CASE)
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", RUN_FILES)
def test_a_wrong_run_file_is_one_sentence(case: str, tmp_path: Path) -> None:
    content, says = RUN_FILES[case]
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    assert_refused(lambda: load_run_config(path), ConfigError, says, tmp_path)


@pytest.mark.parametrize("case", OVERRIDES)
def test_a_wrong_override_is_one_sentence(case: str, tmp_path: Path) -> None:
    overrides, says = OVERRIDES[case]
    path = tmp_path / "run.toml"
    path.write_bytes(GOOD)
    # A NUL parts overrides that are wrong together only, except where it is what is wrong.
    parts = overrides.split("\0") if "\0objective" in overrides else [overrides]
    assert_refused(lambda: load_run_config(path, parts), ConfigError, says, tmp_path)


@pytest.mark.parametrize("case", RESUMED)
def test_a_damaged_configuration_of_a_run_is_one_sentence(case: str, tmp_path: Path) -> None:
    content, says = RESUMED[case]
    (tmp_path / "config.json").write_bytes(content)
    assert_refused(RunDirectory.open(tmp_path).read_config, ConfigError, says, tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("absent", "No such file"),
        ("folder", "Is a directory"),
        ("file/below", "Not a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("dangling", "No such file"),
        ("pipe", "not a regular file"),
        ("a\0b", "null byte"),
        ("x" * 300, "File name too long"),
        ("line\nbreak", "line break: cannot read the run file"),
    ],
)
def test_what_is_no_run_file_is_named(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(GOOD)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert_refused(lambda: load_run_config(tmp_path / name), ConfigError, says)


@pytest.mark.parametrize("command", ["train", "eval", "check"])
@pytest.mark.parametrize("case", ["binary", "deep lists", "unknown section", "field name has a line break", "NUL"])
def test_the_command_line_prints_the_sentence_and_nothing_else(
    command: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, says = RUN_FILES[case]
    (tmp_path / "run.toml").write_bytes(content)
    assert main([command, str(tmp_path / "run.toml")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("preceptor: ")
    assert_sentence(printed.err, says)
    assert list(tmp_path.iterdir()) == [tmp_path / "run.toml"]


@pytest.mark.parametrize("case", ["two fields in one", "lone surrogate", "steps NaN"])
def test_a_process_ends_with_the_sentence_and_code_1(case: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(GOOD)
    override, says = OVERRIDES[case]
    found = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "train", str(tmp_path / "run.toml"), override],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (found.returncode, found.stdout) == (1, "")
    assert_sentence(found.stderr, says)
    assert list(tmp_path.iterdir()) == [tmp_path / "run.toml"]
