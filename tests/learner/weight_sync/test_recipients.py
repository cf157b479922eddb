"""Workers of a weight update that die are passed over, and what they hold is let go before the others are awaited."""

from typing import Any

import pytest

from cluster.contracts.errors import ActorDiedError
from learner.weight_sync import recipients
from learner.weight_sync.recipients import Recipients


class Answers:
    """Stands for Ray: worker 1 is gone; notes what was awaited, and for how long."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def get(self, references: Any, seconds: float, waiting_for: str) -> Any:
        self.events.append((references, seconds))
        if references in ([10, 11], 11):
            raise ActorDiedError("rollout worker 1 is gone")
        return references


@pytest.mark.parametrize(("granted", "seconds"), [(5.0, 5.0), (None, 60.0)])
def test_a_death_is_told_before_the_others_are_waited_for_and_says_for_how_long(
    monkeypatch: pytest.MonkeyPatch, granted: float | None, seconds: float
) -> None:
    cluster = Answers()
    monkeypatch.setattr(recipients, "RAY", cluster)
    workers: Any = ["a", "b"]
    some = Recipients(workers, 60.0)

    def let_go() -> float | None:
        cluster.events.append("let go")
        return granted

    assert some.answers({0: 10, 1: 11}, "receive", on_death=let_go) == {0: 10}
    assert cluster.events == [([10, 11], 60.0), "let go", (10, seconds), (11, seconds)]
    assert some.workers == {0: "a"}
