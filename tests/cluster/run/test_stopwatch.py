import time

import pytest

from cluster.run.step_metrics import Stopwatch


def test_a_stage_is_measured_from_its_beginning_to_its_end() -> None:
    watch = Stopwatch()
    with watch.measure("learn"):
        time.sleep(0.02)
        with watch.measure("sync"):
            time.sleep(0.05)
    assert watch.seconds("sync") == pytest.approx(0.05, abs=0.02)
    assert watch.seconds("learn") >= 0.07
    assert watch.started["learn"] < watch.started["sync"] < watch.ended["sync"] <= watch.ended["learn"]
