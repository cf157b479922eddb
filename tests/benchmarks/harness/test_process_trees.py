import os
import subprocess
import sys
import time

from benchmarks.harness.process_trees import cpu_seconds, descendants, end, spent

# Starts a process that computes, and waits for it.
NESTED = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"


def test_a_process_that_computes_is_counted_under_the_one_that_started_it_and_can_be_ended() -> None:
    parent = subprocess.Popen([sys.executable, "-c", NESTED])
    try:
        deadline = time.monotonic() + 20
        while len(descendants(parent.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        tree = descendants(parent.pid)
        before = cpu_seconds(tree)
        time.sleep(0.5)
        assert spent(before, cpu_seconds(tree)) > 0.05
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
