"""Says at the terminal that a teacher's server is away while the run waits for it, and that it is back."""

import threading
from dataclasses import dataclass, field
from time import perf_counter

from cluster.config.stages import TeacherConfig
from cluster.run.hooks import RunContext, StepHook
from teacher_workers.backends.base import find_backend

LATE_SECONDS = 10.0  # that a batch is being scored before its teacher is asked
CHECK_SECONDS = 5.0  # from one question to the next


@dataclass
class _Check:
    """Asks the backends of teachers in a thread of its own, for an answer may take as long as a connection does."""

    teachers: dict[str, TeacherConfig]
    absences: dict[str, str] = field(default_factory=dict)  # by teacher, as far as it was asked

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._ask, name="teachers' servers", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def _ask(self) -> None:
        for name, teacher in self.teachers.items():
            self.absences[name] = find_backend(teacher).absence(teacher)


class ServedTeachers(StepHook):
    """Asks a teacher only while it is late or known to be away, so a server that answers hears of no question."""

    def __init__(
        self, run: RunContext, late_seconds: float = LATE_SECONDS, check_seconds: float = CHECK_SECONDS
    ) -> None:
        super().__init__(run)
        self._late_seconds, self._check_seconds = late_seconds, check_seconds
        self._check: _Check | None = None
        self._next_check = 0.0
        self._away_since: dict[str, float] = {}  # by teacher

    def while_waiting(self) -> None:
        now = perf_counter()
        if self._check is not None:
            if self._check.is_done:
                self._report(self._check, now)
                self._check, self._next_check = None, now + self._check_seconds
        elif now >= self._next_check and (teachers := self._teachers_to_ask(now)):
            self._check = _Check(teachers)

    def _teachers_to_ask(self, now: float) -> dict[str, TeacherConfig]:
        teachers = {}
        for name, pool in self.run.pipeline.teachers.pools.items():
            oldest = next(iter(pool.outstanding.values()), None)  # they are in the order in which they were sent
            if name in self._away_since or (oldest is not None and now - oldest.sent_at >= self._late_seconds):
                teachers[name] = pool.teacher
        return teachers

    def _report(self, check: _Check, now: float) -> None:
        for name, absence in check.absences.items():
            if absence and name not in self._away_since:
                self._away_since[name] = now
                seconds = check.teachers[name].retry_seconds
                self.run.view.say(f"teacher {name}: {absence}; its rows wait, each for up to {seconds:.0f} s")
            elif not absence and name in self._away_since:
                seconds = now - self._away_since.pop(name)
                self.run.view.say(f"teacher {name}: its server answers again, after {seconds:.0f} s")
