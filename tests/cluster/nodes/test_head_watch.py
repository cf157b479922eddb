"""A head that is gone is noticed, and one that only was away for a moment is not given up."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue

import pytest

from cluster.monitoring.status_file import read_status
from cluster.nodes.ray_session import Patience, watch_head

PATIENCE = Patience(check_seconds=0.05, silent_seconds=2.0)
SILENCE_AND_MORE = PATIENCE.silent_seconds + 0.5
SOON = 60.0  # the machine may be busy


@contextmanager
def head(port: int = 0) -> Iterator[str]:
    """Take connections as a head does."""
    with socket.create_server(("127.0.0.1", port), backlog=128) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_head_that_is_gone_is_given_up_once() -> None:
    silent: Queue[float] = Queue()
    with head() as address:
        watch = watch_head(address, silent.put, PATIENCE)
        watch.__enter__()
        with pytest.raises(Empty):
            silent.get(timeout=SILENCE_AND_MORE)  # it answers
    try:
        assert silent.get(timeout=SOON) >= PATIENCE.silent_seconds
        with pytest.raises(Empty):
            silent.get(timeout=SILENCE_AND_MORE)
    finally:
        watch.__exit__(None, None, None)


def test_a_head_that_comes_back_in_time_is_not_given_up() -> None:
    silent: Queue[float] = Queue()
    with head() as address:
        port = int(address.rpartition(":")[2])
    with watch_head(address, silent.put, PATIENCE):
        with pytest.raises(Empty):
            silent.get(timeout=PATIENCE.silent_seconds / 10)
        with head(port), pytest.raises(Empty):
            silent.get(timeout=SILENCE_AND_MORE)


def test_nobody_is_looked_after_when_the_session_is_over() -> None:
    silent: Queue[float] = Queue()
    with head() as address, watch_head(address, silent.put, PATIENCE):
        pass
    with pytest.raises(Empty):
        silent.get(timeout=SILENCE_AND_MORE)


TRAINING = """
import sys, time
from pathlib import Path
from cluster.demo import embedded_config
from cluster.nodes.ray_session import end_run
from cluster.monitoring.status_file import KeptStatus
config = embedded_config([f"run.directory={sys.argv[1]}", "run.name=run"])
Path(sys.argv[1], "run").mkdir()
with KeptStatus(Path(sys.argv[1], "run", "status.json"), steps=10):
    end_run(config, "head:6379", 45.4)
"""


def test_a_run_whose_head_is_gone_ends_with_one_sentence_and_notes_it(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", TRAINING, str(tmp_path)], capture_output=True, text=True, check=False, env={**os.environ}
    )
    sentence = (
        "the head of the Ray cluster has not answered at head:6379 for 45 s, and nothing can go on without it; start "
        f"the cluster again, and go on with preceptor train --resume {tmp_path}/run"
    )
    assert (found.returncode, found.stderr) == (1, f"preceptor: {sentence}\n")
    status = read_status(tmp_path / "run/status.json")
    assert status is not None
    assert (status.state, status.error) == ("failed", sentence)


def test_another_run_of_that_name_is_left_alone(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", TRAINING, str(tmp_path)], capture_output=True, check=False)
    before = (tmp_path / "run/status.json").read_bytes()
    only_checking = TRAINING.replace('Path(sys.argv[1], "run").mkdir()\n', "").replace(
        'with KeptStatus(Path(sys.argv[1], "run", "status.json"), steps=10):', "if True:"
    )
    found = subprocess.run(
        [sys.executable, "-c", only_checking, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert found.stderr.endswith("start the cluster again\n")
    assert (tmp_path / "run/status.json").read_bytes() == before
