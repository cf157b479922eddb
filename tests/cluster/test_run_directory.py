from pathlib import Path

import pytest

from cluster.contracts.errors import CheckpointError, ConfigError
from cluster.run_directory import RunDirectory
from tests.builders import make_config


def test_a_run_writes_its_resolved_configuration(tmp_path: Path) -> None:
    config = make_config(f"run.directory='{tmp_path}'", "run.steps=7")
    directory = RunDirectory.create(config)
    assert RunDirectory.open(directory.path).read_config() == config


def test_only_the_owner_may_read_a_run(tmp_path: Path) -> None:
    directory = RunDirectory.create(make_config(f"run.directory='{tmp_path}'"))
    assert directory.path.stat().st_mode & 0o077 == 0


def test_a_second_run_of_the_same_name_is_refused(tmp_path: Path) -> None:
    config = make_config(f"run.directory='{tmp_path}'")
    RunDirectory.create(config)
    with pytest.raises(ConfigError, match="holds a run already; continue it with --resume"):
        RunDirectory.create(config)


def test_a_folder_that_holds_no_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run"):
        RunDirectory.open(tmp_path)
