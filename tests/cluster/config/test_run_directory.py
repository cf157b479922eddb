import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import CheckpointError, ConfigError
from tests.builders import make_config


def test_a_run_writes_its_resolved_configuration(tmp_path: Path) -> None:
    config = make_config(f"run.directory='{tmp_path}'", "run.steps=7")
    directory = RunDirectory.create(config)
    assert RunDirectory.open(directory.path).read_config() == config


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Every mask of modes that a shell may have set."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_only_the_owner_may_read_a_run_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    directory = RunDirectory.create(make_config(f"run.directory='{tmp_path}/made/by the run'"))
    made = [tmp_path / "made", tmp_path / "made/by the run", directory.path]
    assert [path.stat().st_mode & 0o777 for path in made] == [0o700] * 3
    assert directory.config.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_was_there_before_stays_as_open_as_it_was(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    RunDirectory.create(make_config(f"run.directory='{tmp_path}'"))
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_an_empty_folder_of_the_runs_name_is_closed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    assert RunDirectory.create(make_config(f"run.directory='{tmp_path}'")).path.stat().st_mode & 0o777 == 0o700


def test_a_second_run_of_the_same_name_is_refused(tmp_path: Path) -> None:
    config = make_config(f"run.directory='{tmp_path}'")
    RunDirectory.create(config)
    with pytest.raises(ConfigError, match="holds a run already; continue it with --resume"):
        RunDirectory.create(config)


@pytest.mark.parametrize("create", [RunDirectory.create, RunDirectory.refuse_taken])
def test_a_folder_that_cannot_be_made_is_one_sentence(
    tmp_path: Path, create: Callable[[Config], RunDirectory | None]
) -> None:
    (tmp_path / "file").write_text("")
    config = make_config(f"run.directory='{tmp_path}/file/deep'")
    with pytest.raises(ConfigError, match=rf"deep/run: cannot make the run directory: {tmp_path}/file is not a folder"):
        create(config)


def test_what_the_system_says_of_a_folder_is_in_the_sentence() -> None:
    with pytest.raises(ConfigError, match=r"/proc/none/run: cannot make the run directory: .*; name another folder in"):
        RunDirectory.create(make_config("run.directory='/proc/none'"))


def test_of_runs_of_one_name_that_start_at_once_one_gets_the_folder(tmp_path: Path) -> None:
    config, at_once = make_config(f"run.directory='{tmp_path}'"), threading.Barrier(8)

    def create(_: int) -> bool:
        at_once.wait()
        with suppress(ConfigError):
            RunDirectory.create(config)
            return True
        return False

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(create, range(8))) == 1


def test_a_folder_that_holds_no_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run"):
        RunDirectory.open(tmp_path)


def test_a_folder_that_cannot_be_looked_into_is_one_sentence() -> None:
    with pytest.raises(CheckpointError, match="x: cannot look for a run there: File name too long"):
        RunDirectory.open(Path("x" * 5000))
