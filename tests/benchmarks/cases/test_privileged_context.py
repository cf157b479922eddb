"""The study of privileged contexts varies what it says."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.cases import privileged_context as study
from benchmarks.cases.figures import draw_privileged_context
from benchmarks.harness.shifted_digits import (
    EMPTY,
    FIRST_CONTEXT,
    FIRST_MARK,
    Questions,
    draw_questions,
    sign_flip_p,
    text_of,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost most of the time of products this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_text_holds_every_digit_before_its_answer() -> None:
    prompts = torch.tensor([[EMPTY, FIRST_MARK, 1, 2, 3, 4]])
    questions = Questions(prompts, torch.tensor([5]))
    assert questions.answers.tolist() == [[6, 0, 1, 2]]
    text = text_of(questions.with_contexts(questions.shifts), questions.answers)
    assert text.tolist() == [[FIRST_CONTEXT + 5, FIRST_MARK, 1, 6, 2, 0, 3, 1, 4, 2]]


def test_arms_differ_in_what_the_teacher_reads_alone() -> None:
    table = torch.tensor([3, 1, 4, 0, 5, 2, 6])
    questions = draw_questions(torch.Generator().manual_seed(0), 50, study.DIGITS, table)
    assert (questions.shifts == table[questions.prompts[:, 1] - FIRST_MARK]).all()
    contexts = {arm: study.contexts_of(arm, questions, torch.Generator().manual_seed(1)) for arm in study.ARMS}
    assert contexts["rule"].tolist() == contexts["instance"].tolist() == questions.shifts.tolist()
    assert sorted(contexts["shuffled"].tolist()) == sorted(questions.shifts.tolist())
    assert contexts["shuffled"].tolist() != questions.shifts.tolist()
    assert set(contexts["random"].tolist()) == set(study.RANDOM_SHIFTS)


@pytest.mark.parametrize(("differences", "p"), [([0.1, 0.2, 0.3, 0.1, 0.2], 1 / 32), ([1.0, -1.0], 3 / 4)])
def test_the_sign_flip_test_counts_all_choices_of_signs(differences: list[float], p: float) -> None:
    assert sign_flip_p(differences) == p


def test_a_study_gives_rows_and_a_small_figure(tmp_path: Path) -> None:
    outcomes = list(study.study(0, study.ARMS, steps=1, pretraining_steps=1))
    rows = {row["name"]: row for row in study.rows_of(outcomes)}
    # One step teaches nothing: every arm still guesses.
    assert all(rows[f"{arm}: accuracy without context, held-out prompts"]["value"] < 0.5 for arm in study.ARMS)
    assert "differences" in rows["rule - shuffled, held-out accuracy, smallest"]
    draw_privileged_context({"outcomes": outcomes}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size < 100_000
