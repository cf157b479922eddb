import time

import pytest

from cluster.run.step_metrics import Stopwatch


def test_a_stage_is_measured_from_its_beginning_to_its_end() -> None:
    watch = Stopwatch()
    with watch.measure("learn"):
        time.sleep(0.02)
        with watch.measure("sync"):
            time.sleep(0.05)
    # A busy machine sleeps longer, never shorter.
    assert watch.seconds("sync") >= 0.05
    assert watch.seconds("sync") == pytest.approx(watch.ended["sync"] - watch.started["sync"])
    assert watch.seconds("learn") >= watch.seconds("sync") + 0.02
    assert watch.started["learn"] < watch.started["sync"] < watch.ended["sync"] <= watch.ended["learn"]
