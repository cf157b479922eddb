"""Which tokens have no loss, by what the student's files say of them."""

import pytest

from cluster.config.objective import TokenWeightsConfig
from cluster.config.sections import StudentConfig
from cluster.demo import EMBEDDED
from cluster.models.model_checks import ignored_ids

PAD, BOS, EOS, UNKNOWN = range(4)  # the embedded student's special tokens; 9 is an ordinary one


@pytest.mark.parametrize(
    ("weights", "stop_token_ids", "expected"),
    [
        ({}, (9,), set()),
        ({"special_tokens": False}, (), {PAD, BOS, UNKNOWN}),
        ({"special_tokens": False}, (BOS, 9), {PAD, UNKNOWN}),
        ({"stop_tokens": False}, (9,), {EOS, 9}),
        ({"special_tokens": False, "stop_tokens": False}, (9,), {PAD, BOS, UNKNOWN, EOS, 9}),
    ],
)
def test_tokens_that_end_a_completion_are_apart_from_other_special_ones(
    weights: dict[str, bool], stop_token_ids: tuple[int, ...], expected: set[int]
) -> None:
    student = StudentConfig(str(EMBEDDED / "student"))
    assert ignored_ids(student, TokenWeightsConfig(**weights), stop_token_ids) == expected
