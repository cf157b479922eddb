import time
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config.run_directory import RunDirectory
from cluster.config.stages import TeacherConfig
from cluster.run.served_teachers import ServedTeachers
from tests.builders import make_config
from tests.cluster.run.contexts import make_run_context
from tests.teacher_workers.backends.fake_server import FakeServer, teacher_at


class CountingServer(FakeServer):
    """Counts how often it is asked for its models."""

    questions = 0

    def models(self, authorization: str | None) -> tuple[int, bytes]:
        self.questions += 1
        return super().models(authorization)


class WaitingRun:
    """A run that has waited for a teacher's batch since a time."""

    def __init__(self, folder: Path, teacher: TeacherConfig, sent_at: float) -> None:
        pool = SimpleNamespace(teacher=teacher, outstanding={"ref": SimpleNamespace(sent_at=sent_at)})
        pipeline: Any = SimpleNamespace(teachers=SimpleNamespace(pools={"main": pool}))
        config = make_config()
        context = make_run_context(config, None, pipeline, RunDirectory(folder))  # type: ignore[arg-type]
        self._hook = ServedTeachers(context, late_seconds=5.0, check_seconds=0.0)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        deadline = perf_counter() + seconds
        while perf_counter() < deadline and not until():
            began = perf_counter()
            self._hook.while_waiting()
            assert perf_counter() - began < 5.0  # it asks in a thread, which may wait for 10 s
            time.sleep(0.02)

    def wait_for_line(self, capsys: pytest.CaptureFixture[str]) -> str:
        """Return the next line that the run prints, and see that no other follows."""
        printed: list[str] = []
        self.wait(60.0, lambda: bool(printed.extend(capsys.readouterr().out.splitlines()) or printed))
        self.wait(0.2)
        [line] = [*printed, *capsys.readouterr().out.splitlines()]
        return line


def test_a_server_that_is_away_is_named_once_and_so_is_its_return(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = FakeServer()
    with server:
        teacher = teacher_at(server, retry_seconds=600.0)
    run = WaitingRun(tmp_path, teacher, sent_at=perf_counter() - 6.0)
    away = run.wait_for_line(capsys)
    assert away.startswith(f"teacher main: {teacher.urls[0]}/models cannot be reached")
    assert away.endswith("; its rows wait, each for up to 600 s")
    with server:
        back = run.wait_for_line(capsys)
    assert back.startswith("teacher main: its server answers again, after ")


def test_a_server_that_answers_in_time_is_not_asked(tmp_path: Path) -> None:
    with CountingServer() as server:
        WaitingRun(tmp_path, teacher_at(server), sent_at=perf_counter()).wait(0.3)
        assert server.questions == 0
        WaitingRun(tmp_path, teacher_at(server), sent_at=perf_counter() - 6.0).wait(60.0, lambda: server.questions > 0)
        assert server.questions > 0
