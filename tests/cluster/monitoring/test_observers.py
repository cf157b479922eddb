import pytest

from cluster.contracts.errors import RunStopped, ScoreError
from cluster.monitoring.observers import Ending, Observers, StepSample


class Noting:
    """Notes what it is told; fails at the given step."""

    def __init__(self, fails_at: int = 0) -> None:
        self.steps: list[int] = []
        self.endings: list[Ending] = []
        self._fails_at = fails_at

    def on_step(self, seen: StepSample) -> None:
        if seen.step == self._fails_at:
            raise OSError(28, "No space left on device")
        self.steps.append(seen.step)

    def close(self, ending: Ending) -> None:
        self.endings.append(ending)


def step(number: int) -> StepSample:
    return StepSample({"step": number}, [], [], [])


def test_who_cannot_write_is_told_no_more_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    full, other = Noting(fails_at=2), Noting()
    observers = Observers([full, other])
    for number in range(1, 4):
        observers.on_step(step(number))
    observers.close(None)
    assert (full.steps, other.steps) == ([1], [1, 2, 3])
    assert (full.endings, other.endings) == ([], ["ended"])
    assert "Noting: [Errno 28] No space left on device; the run goes on without it" in caplog.text


@pytest.mark.parametrize(
    ("error", "ending"), [(RunStopped("asked"), "stopped"), (KeyboardInterrupt(), "stopped"), (ScoreError(), "failed")]
)
def test_observers_hear_how_the_run_ended(error: BaseException, ending: Ending) -> None:
    noting = Noting()
    Observers([noting]).close(error)
    assert noting.endings == [ending]
