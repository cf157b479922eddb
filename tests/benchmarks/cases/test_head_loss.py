import pytest

from benchmarks.cases.head_loss import Heard


@pytest.mark.parametrize(
    ("exit_code", "said", "met"),
    [
        (1, ["preceptor: the head is gone"], [True, True]),
        (1, [], [True, False]),
        (1, ["preceptor: the head is gone", "Traceback"], [True, False]),
        (0, ["preceptor: the head is gone"], [True, False]),
    ],
)
def test_only_one_sentence_and_a_failure_will_do(exit_code: int, said: list[str], met: list[bool]) -> None:
    rows = Heard("who follows", 30.0, exit_code, said).rows()
    assert [found["met"] for found in rows] == met


def test_a_sentence_that_comes_when_ray_would_have_ended_the_driver_is_too_late() -> None:
    assert [found["met"] for found in Heard("a driver", 61.0, 1, ["preceptor: gone"]).rows()] == [False, True]
