import time
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

    def wait(self, seconds: float) -> None:
        deadline = perf_counter() + seconds
        while perf_counter() < deadline:
            began = perf_counter()
            self._hook.while_waiting()
            assert perf_counter() - began < 0.5  # it asks in a thread
            time.sleep(0.02)


def test_a_server_that_is_away_is_named_once_and_so_is_its_return(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = FakeServer()
    with server:
        teacher = teacher_at(server, retry_seconds=600.0)
    run = WaitingRun(tmp_path, teacher, sent_at=perf_counter() - 6.0)
    run.wait(0.5)
    [away] = capsys.readouterr().out.splitlines()
    assert away.startswith(f"teacher main: {teacher.urls[0]}/models cannot be reached")
    assert away.endswith("; its rows wait, each for up to 600 s")
    with server:
        run.wait(0.5)
    [back] = capsys.readouterr().out.splitlines()
    assert back.startswith("teacher main: its server answers again, after ")


def test_a_server_that_answers_in_time_is_not_asked(tmp_path: Path) -> None:
    with CountingServer() as server:
        WaitingRun(tmp_path, teacher_at(server), sent_at=perf_counter()).wait(0.3)
        assert server.questions == 0
        WaitingRun(tmp_path, teacher_at(server), sent_at=perf_counter() - 6.0).wait(0.3)
        assert server.questions > 0
