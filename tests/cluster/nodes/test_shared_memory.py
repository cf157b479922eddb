"""A container with little shared memory is a sentence, and no stop."""

import shutil
from pathlib import Path

import pytest

from cluster.nodes.ray_session import LOCAL_OBJECT_STORE_BYTES, object_store_bytes, shared_memory_warning


def test_a_store_that_fits_is_not_spoken_of(tmp_path: Path) -> None:
    assert shared_memory_warning(tmp_path, needed_bytes=1 << 10) == ""


def test_a_store_that_does_not_fit_lies_on_disk_and_the_cure_is_said(tmp_path: Path) -> None:
    too_much = shutil.disk_usage(tmp_path).total + (1 << 30)
    warning = shared_memory_warning(tmp_path, too_much)
    assert warning.startswith(f"{tmp_path} has ")
    assert f"so Ray's object store of {too_much >> 20} MiB lies on disk" in warning
    missing = shared_memory_warning(tmp_path / "none", 1 << 30)
    assert missing.startswith(f"{tmp_path / 'none'} has 0 MiB")
    assert missing.endswith("give a container more with --shm-size 2g")


def test_where_there_are_gpus_the_store_is_a_share_of_memory_that_shared_memory_holds(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert object_store_bytes(tmp_path, has_gpus=False, memory_bytes=1 << 50) == LOCAL_OBJECT_STORE_BYTES
    assert object_store_bytes(tmp_path, True, 10 << 30) == pytest.approx(min(3 << 30, 0.9 * free), rel=0.01)
    assert object_store_bytes(tmp_path, True, 1 << 50) == pytest.approx(0.9 * free, rel=0.01)
    assert object_store_bytes(tmp_path, True, 2 << 30) == LOCAL_OBJECT_STORE_BYTES  # never less
    assert object_store_bytes(tmp_path / "none", True, 1 << 40) == LOCAL_OBJECT_STORE_BYTES  # and the warning says why
