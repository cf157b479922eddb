"""Fixtures that several folders share, and how the tests are spread over processes."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cluster.nodes.local_cluster import local_cluster
from tests.leak_check import Watch
from tests.xdist_scheduler import ByFile

WATCH = pytest.StashKey[Watch]()
LEFT = pytest.StashKey[list[str]]()


def is_one_of_several() -> bool:
    """Return whether this process runs a part of the tests, for another that waits for it."""
    return "PYTEST_XDIST_WORKER" in os.environ


def pytest_configure(config: pytest.Config) -> None:
    """Mark everything that the tests start, and give it a folder of its own for temporary files."""
    if not is_one_of_several():  # those are marked by who starts them
        # A job of a non-interactive shell ignores SIGINT, and so would every program that the tests interrupt.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        config.stash[WATCH] = Watch.begin()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if a process, a shared-memory segment or a temporary file of its tests is left."""
    if is_one_of_several():
        return
    left = session.config.stash[WATCH].end()
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        session.config.stash[LEFT] = left


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what is left."""
    for line in config.stash.get(LEFT, []):
        terminalreporter.write_line(f"LEFT BEHIND by the tests: {line}", red=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """Spread files over processes, not single tests."""
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs more GPUs than there are."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        needed = max((mark.kwargs.get("gpus", 1) for mark in item.iter_markers("gpu")), default=0)
        if needed > found:
            reason = "needs an NVIDIA GPU" if needed == 1 else f"needs {needed} NVIDIA GPUs on this machine"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Start one local Ray cluster for all tests that talk to actors themselves."""
    variables = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with local_cluster(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": variables},
    ):
        yield
