from pathlib import Path
from typing import Any

from benchmarks.cases.screenshots import View, photograph
from benchmarks.harness.browser import Page


class StillPage(Page):
    """A page that says the same from the beginning."""

    def __init__(self, text: str) -> None:
        self._text = text

    def _call(self, method: str, **parameters: Any) -> Any:
        return {"result": {"value": self._text}, "data": "UE5H"}

    def wait_for(self, is_true: Any, seconds: float) -> str:
        return super().wait_for(is_true, 0.0)


def test_a_page_that_names_all_actors_lacks_nothing_and_is_photographed(tmp_path: Path) -> None:
    view = View("job", "http://head/#/jobs/01", 100, ("rollout-0", "learner-0"))
    assert photograph(StillPage("rollout-0 ALIVE\nlearner-0 ALIVE"), view, tmp_path) == []
    assert (tmp_path / "job.png").read_bytes() == b"PNG"


def test_no_path_of_this_machine_is_shown(tmp_path: Path) -> None:
    view = View("job", "http://head/#/jobs/01", 100, ())
    [found] = photograph(StillPage(f"{Path.home()}/runs"), view, tmp_path)
    assert found == f"job.png: the page shows {Path.home()}, which is this machine's own"


def test_a_page_without_an_actor_is_told_which(tmp_path: Path) -> None:
    view = View("job", "http://head/#/jobs/01", 100, ("rollout-0", "learner-0"))
    assert photograph(StillPage("rollout-0 ALIVE"), view, tmp_path) == ["job.png: the page does not show learner-0"]
