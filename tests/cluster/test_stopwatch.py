import time

import pytest

from cluster.stopwatch import Stopwatch


def test_an_iterator_is_measured_to_its_end_and_its_follower_from_there() -> None:
    watch = Stopwatch()
    with watch.measure("score"):
        for _ in watch.watch("generate", range(2)):
            time.sleep(0.02)
        time.sleep(0.05)
    assert watch.seconds("generate") == pytest.approx(0.04, abs=0.02)
    assert watch.seconds_after("score", "generate") == pytest.approx(0.05, abs=0.02)
    assert watch.seconds("score") >= 0.09
