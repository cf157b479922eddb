"""The files of kept rows, and which rows are kept."""

import pyarrow as pa
import pytest

from cluster.contracts.errors import CheckpointError
from cluster.contracts.kept_rows import KeptRowFiles, chosen_ids


def rows(num_bytes=0):
    """Make a table of one row with so many bytes that do not compress."""
    import random

    return pa.table({"step": [1], "text": [random.Random(num_bytes).randbytes(num_bytes)]})


def test_the_choice_follows_from_seed_and_step_alone():
    chosen = chosen_ids(7, 5, 100, 4)
    assert len(chosen) == 4
    assert all(500 <= one < 600 for one in chosen)
    assert chosen == chosen_ids(7, 5, 100, 4)
    assert len({chosen_ids(seed, 5, 100, 4) for seed in range(9)}) > 1


def test_no_more_rows_are_chosen_than_a_step_has():
    assert chosen_ids(0, 1, 3, 10) == {3, 4, 5}


def test_files_stay_within_their_bytes_and_cover_the_whole_run(tmp_path):
    files = KeptRowFiles(tmp_path / "kept", most_bytes=100_000)
    for step in range(1, 101):
        if files.wants(step):
            files.write(step, rows(9_000))
    kept = list(files.files())
    assert sum(path.stat().st_size for path in files.files().values()) <= 100_000
    assert kept == [16, 32, 48, 64, 80, 96]
    assert not KeptRowFiles(tmp_path / "kept").wants(100)  # a resumed run goes on at the same distance
    assert KeptRowFiles(tmp_path / "kept").wants(112)


def test_a_step_that_is_too_large_by_itself_leaves_nothing(tmp_path):
    files = KeptRowFiles(tmp_path / "kept", most_bytes=1_000)
    files.write(1, rows(9_000))
    assert files.files() == {}


def test_a_resumed_run_forgets_the_rows_of_steps_that_it_does_again(tmp_path):
    files = KeptRowFiles(tmp_path / "kept")
    for step in (1, 2, 3):
        files.write(step, rows())
    files.drop_from(2)
    assert [step for step, _ in files.read()] == [1]


def test_a_run_that_kept_none_has_none(tmp_path):
    files = KeptRowFiles(tmp_path / "kept")
    files.drop_from(0)
    assert list(files.read()) == []


def test_a_damaged_file_is_named(tmp_path):
    files = KeptRowFiles(tmp_path)
    files.write(3, rows())
    [path] = files.files().values()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"step-00000003.arrow: no kept rows: .*; remove the file"):
        list(files.read())
