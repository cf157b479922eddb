"""Fixtures that several folders share, and how the tests are spread over processes."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.nodes.preloaded_python import PYTHON_VARIABLE, preloaded_python
from tests.leak_check import Watch
from tests.xdist_scheduler import ByFile, place

if TYPE_CHECKING:
    from tests.rollout_workers.deployment import RolloutDeployment

WATCH = pytest.StashKey[Watch]()
# xdist's workers are forked from where the imports are, which takes no "-u", and they need none.
WORKER = 'popen//python=sh -c \'shift; exec "$0" "$@"\' {}'
IMPORTS = pytest.StashKey[ExitStack]()
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
        config.stash[IMPORTS] = ExitStack()
        if config.getoption("numprocesses", None):
            config.stash[IMPORTS].enter_context(preloaded_python())
            if python := os.environ.get(PYTHON_VARIABLE):
                config.option.tx = [WORKER.format(python)] * len(config.option.tx)


@pytest.hookimpl(trylast=True)  # the workers have ended then
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if a process, a shared-memory segment or a temporary file of its tests is left."""
    if is_one_of_several():
        return
    session.config.stash[IMPORTS].close()
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
    """Put what takes long first, and skip what needs more GPUs than there are."""
    import torch  # the process that starts the workers does without

    items.sort(key=lambda item: place(item.nodeid))
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        needed = max((mark.kwargs.get("gpus", 1) for mark in item.iter_markers("gpu")), default=0)
        if needed > found:
            reason = "needs an NVIDIA GPU" if needed == 1 else f"needs {needed} NVIDIA GPUs on this machine"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def preloaded() -> Iterator[None]:
    """Import torch, transformers and vLLM once for all actors, engines and commands that the tests start."""
    with preloaded_python():
        yield


@pytest.fixture(scope="session")
def ray_cluster(preloaded: None) -> Iterator[None]:
    """Start one local Ray cluster for all tests that talk to actors themselves."""
    from cluster.nodes.local_cluster import local_cluster  # Ray, which most tests on a GPU do without

    variables = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as environment:
            # Ray would start a Python process for each CPU at once, and use none: they lack the variables above.
            environment.setenv("RAY_prestart_worker_first_driver", "0")
            cluster = local_cluster(
                num_cpus=8,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": variables},
            )
            stack.enter_context(cluster)
        yield


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the model that the rollout actors serve."""
    from tests.tiny_qwen3 import write_tiny_qwen3

    return write_tiny_qwen3(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def rollouts(ray_cluster: None, tiny_student: Path) -> "Iterator[RolloutDeployment]":
    """Start two real rollout actors, which several files share."""
    # Here, for what it imports takes seconds, and most tests do without.
    from tests.rollout_workers.deployment import deployed

    with deployed(tiny_student, "shared", num_workers=2, sampled_candidates=True, merges_stops=True) as deployment:
        yield deployment
