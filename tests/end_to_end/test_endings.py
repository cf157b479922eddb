"""However a run ends, no process, shared memory or temporary file of it stays, and it listens on loopback alone."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import CANARIES, ShortRun
from tests.end_to_end.runs import ENDED_SECONDS, Run, read_all, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def one_interrupt(run: Run) -> int:
    run.signal_group(signal.SIGINT)
    return run.process.wait(ENDED_SECONDS)


def two_interrupts(run: Run) -> int:
    run.signal_group(signal.SIGINT)
    time.sleep(0.2)
    run.signal_group(signal.SIGINT)
    return run.process.wait(ENDED_SECONDS)


def termination(run: Run) -> int:
    run.process.terminate()
    return run.process.wait(ENDED_SECONDS)


def killing(run: Run) -> int:
    run.process.kill()
    return run.process.wait(ENDED_SECONDS)


# In the middle of a run: one interrupt in tests/end_to_end/test_what_is_seen.py, a kill in test_two_teachers.py, what
# `preceptor stop` sends in tests/cluster/jobs/test_submit.py.
ENDINGS = [
    pytest.param(two_interrupts, "step 2 ", 130, marks=pytest.mark.exhaustive),
    (one_interrupt, "run: ", 130),  # while engines start
    pytest.param(termination, "run: ", 130, marks=pytest.mark.exhaustive),
    pytest.param(killing, "step 2 ", -signal.SIGKILL, marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("end", "after", "code"), ENDINGS)
def test_nothing_stays_of_a_run_that_is_ended(end: Callable[[Run], int], after: str, code: int, tmp_path: Path) -> None:
    settings = ("evaluation.num_prompts=16", "evaluation.teacher_too=false", "ray.dashboard=false")
    with running(tmp_path, "run.steps=100000", *settings) as run:
        run.wait_for(after)
        assert end(run) == code, "".join(run.lines)
        assert run.left() == []


def test_nothing_stays_of_a_run_that_comes_to_its_end(short_run: ShortRun) -> None:
    assert short_run.left == []


def test_every_socket_listens_on_loopback(short_run: ShortRun) -> None:
    listeners = {command for _, command in short_run.seen.addresses}
    for name in ("gcs_server", "raylet", "dashboard", "ray::RolloutActor", "ray::LearnerActor", "VLLM::EngineCore"):
        assert any(name in command for command in listeners), f"{name} was not seen"
    elsewhere = {pair for pair in short_run.seen.addresses if pair[0] not in ("127.0.0.1", "::ffff:127.0.0.1", "::1")}
    assert elsewhere == set()


def test_no_secret_of_the_environment_is_written_anywhere(short_run: ShortRun) -> None:
    written = read_all(short_run.path) | short_run.seen.temporary
    assert any(path.name == "config.json" for path in written)
    assert any(path.name.startswith("raylet") for path in written)
    written[Path("the terminal")] = short_run.output.encode()
    found = {
        (str(path), name) for path, text in written.items() for name in CANARIES if CANARIES[name].encode() in text
    }
    assert found == set()


def test_only_the_owner_may_read_what_a_run_writes_whatever_the_umask(short_run: ShortRun) -> None:
    paths = [short_run.path, *short_run.path.rglob("*")]
    assert {path.name for path in paths} >= {"config.json", "metrics.jsonl", "checkpoints", "export"}
    assert [path for path in paths if path.stat().st_mode & 0o077] == []
    assert [path for path in short_run.path.parents[:4] if path.stat().st_mode & 0o077] == []
    assert short_run.seen.open_folders == set()
