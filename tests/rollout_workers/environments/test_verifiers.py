import pytest

from cluster.contracts.errors import PromptError
from rollout_workers.environments.verifiers import check_answer, verify


@pytest.mark.parametrize(
    ("kind", "completion", "answer", "reward"),
    [
        ("exact", " Paris\n", "Paris", 1.0),
        ("exact", "Paris.", "Paris", 0.0),
        ("regex", "8 + 9 = 17 x 22 + 6 = 28", r"(?:.* x )?(?:22 \+ 6|6 \+ 22) = 28", 1.0),
        ("regex", "22 + 6 = 28 x 1 + 1 = 2", r"(?:.* x )?(?:22 \+ 6|6 \+ 22) = 28", 0.0),
        ("math", r"so the answer is $\frac{1}{2}$", "0.5", 1.0),
        ("math", r"\boxed{3}", "4", 0.0),
        ("math", "I do not know", "4", 0.0),
    ],
)
def test_a_completion_is_right_or_wrong(kind: str, completion: str, answer: str, reward: float) -> None:
    assert verify(kind, completion, answer, finish_reason="stop") == reward


def test_a_completion_that_was_cut_off_is_wrong() -> None:
    assert verify("exact", "Paris", "Paris", finish_reason="length") == 0.0


@pytest.mark.parametrize(("kind", "answer"), [("regex", "("), ("math", "no number here")])
def test_an_answer_that_can_never_match_is_refused(kind: str, answer: str) -> None:
    with pytest.raises(PromptError, match="answer"):
        check_answer(kind, answer)
