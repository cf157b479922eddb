import os
import subprocess
import sys

from benchmarks.harness.process_trees import cpu_seconds, descendants, end, spent
from tests.leak_check import wait_until

SOON = 60.0  # seconds; the machine may be busy

# Starts a process that computes, and waits for it.
NESTED = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"


def test_a_process_that_computes_is_counted_under_the_one_that_started_it_and_can_be_ended() -> None:
    parent = subprocess.Popen([sys.executable, "-c", NESTED])
    try:
        assert wait_until(lambda: len(descendants(parent.pid)) == 2, SOON)
        tree = descendants(parent.pid)
        before = cpu_seconds(tree)
        assert wait_until(lambda: spent(before, cpu_seconds(tree)) > 0.05, SOON)
        assert os.getpid() not in before
    finally:
        for process in reversed(descendants(parent.pid)):
            process.kill()
        parent.wait()
    end(tree)
    assert cpu_seconds(tree) == {}
    assert descendants(parent.pid) == []


def test_a_process_that_started_meanwhile_counts_from_its_beginning() -> None:
    assert spent({1: 2.0}, {1: 2.5, 2: 0.25}) == 0.75
