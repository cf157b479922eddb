from cluster.evaluation import Evaluation
from cluster.training_run import History, summary
from tests.builders import make_config


def test_the_last_line_compares_student_and_teacher() -> None:
    history = History({"main": 1.0}, first_accuracy=0.4901, last_accuracy=0.899, first_kl=0.5, last_kl=0.1)
    assert summary(make_config(), history, seconds=75.2, steps=60) == [
        "60 steps in 75 s",
        "KL to the teacher per token: 0.5000 -> 0.1000",
        "held-out accuracy: student 0.49 -> 0.90, teacher 1.00",
    ]


def test_several_teachers_are_named() -> None:
    config = make_config("teachers.code.model=c")
    history = History({"main": 1.0, "code": 0.5}, first_accuracy=0.1, last_accuracy=0.2)
    assert summary(config, history, 1.0, 1)[-1].endswith("teacher main 1.00, teacher code 0.50")


def make_evaluation(kl: float, completion: str) -> Evaluation:
    return Evaluation({"kl": kl, "completion_length": 3.0}, [{"prompt": "p", "completion": completion}])


def test_without_answers_a_sample_and_the_kl_before_and_after_are_shown() -> None:
    history = History()
    for kl, completion in ((2.0, "a\nb"), (1.5, "between"), (1.0, "c" * 300)):
        history.note_evaluation(make_evaluation(kl, completion))
    lines = summary(make_config(), history, 1.0, 1)
    assert lines[:2] == ['prompt: "p"', 'before: "a\\nb"']
    assert lines[2] == f'after:  "{"c" * 240}..."'
    assert lines[-1] == "KL to the teacher per token: 2.0000 -> 1.0000"
