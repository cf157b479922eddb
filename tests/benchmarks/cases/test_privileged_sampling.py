"""The study of hard and dense prompts measures what it says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import privileged_sampling as study
from benchmarks.cases.figures import draw_privileged_sampling
from benchmarks.harness.paired_arms import rows_of
from benchmarks.harness.shifted_digits import BASE, EMPTY, FIRST_CONTEXT, Model, Questions, draw_questions


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost most of the time of products this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def questions_of(count: int) -> Questions:
    table = torch.tensor([3, 1, 4, 0, 5, 2, 6])
    return draw_questions(torch.Generator().manual_seed(0), count, study.DIGITS, table)


def test_only_a_text_whose_answers_are_all_right_is_rewarded_in_either_way_of_writing() -> None:
    questions = questions_of(3)
    answers = questions.answers.clone()
    answers[1] += study.OTHER_WAY
    answers[2, 4] = (answers[2, 4] + 1) % BASE
    assert study.rewards_of(questions, answers).tolist() == [1, 1, 0]
    assert (study.with_hints(questions)[:, 0] == FIRST_CONTEXT + questions.shifts).all()
    assert (questions.prompts[:, 0] == EMPTY).all()


def test_an_arm_counts_every_token_that_it_samples_with_and_without_hints() -> None:
    torch.manual_seed(0)
    student = study.Student(Model(study.VOCABULARY, study.TEXT_TOKENS), questions_of(4), seed=0)
    questions, texts = student.hinted_texts(student.questions)
    assert student.sampled_tokens == 4 * study.SAMPLES * study.DIGITS
    assert len(questions) == len(texts) == 0  # an untrained model guesses
    assert student.rates == {"hinted_solve_rate": 0, "acceptance": 0}


def test_of_the_right_texts_the_likeliest_is_imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of writing are right, and an untrained model's log-probabilities of them differ."""
    torch.manual_seed(0)
    student = study.Student(Model(study.VOCABULARY, study.TEXT_TOKENS), questions_of(1), seed=0)
    right = student.questions.answers
    texts = torch.cat([right, right + study.OTHER_WAY] * (study.SAMPLES // 2))
    monkeypatch.setattr(student, "sample", lambda questions, prompts, model: texts)
    _, selected = student.hinted_texts(student.questions)
    prompts = student.questions.prompts.repeat(2, 1)
    sums = student.logprobs(prompts, texts[:2]).gather(-1, texts[:2, :, None])[..., 0].sum(1)
    assert selected.tolist() == [texts[int(sums.argmax())].tolist()]


def test_a_teacher_writes_without_hints_and_a_sampler_learns_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    student = study.Student(Model(study.VOCABULARY, study.TEXT_TOKENS), questions_of(4), seed=0)
    read = list[tuple[object, bool]]()

    def write(model: Model, prompts: torch.Tensor, draw: object) -> torch.Tensor:
        read.append((model, bool((prompts[:, 0] == EMPTY).all())))
        return torch.zeros(len(prompts), study.DIGITS, dtype=torch.long)

    monkeypatch.setattr(study, "write", write)
    teacher = Model(study.VOCABULARY, study.TEXT_TOKENS)
    student.writer = teacher, False
    student.hinted_texts(student.questions)
    assert read == [(teacher, True)]
    monkeypatch.setattr(study, "SAMPLER_STEPS", 2)
    before, sampled = student.model.head.weight.clone(), student.sampled_tokens
    rates = student.train_sampler()
    assert [is_blind for _, is_blind in read[1:]] == [False, False]
    assert student.sampled_tokens == sampled + 2 * 4 * study.SAMPLES * study.DIGITS
    assert rates["first_reward"] == 0 < rates["first_gentleness"] < 1
    assert torch.equal(student.model.head.weight, before)  # the student itself has learned nothing
    assert student.writer is not None
    assert student.writer[0] is not student.model


def outcome(name: str, arm: str, seed: int, hard: float, dense: float) -> dict[str, Any]:
    curves = {"hard": [[0, 0.0], [9, hard]], "dense": [[0, 0.5], [9, dense]]}
    rates = dict.fromkeys(("measured_anew_hard", "measured_anew_dense", "hint_on_hard", "other_way"), 0.0)
    rates |= dict.fromkeys(("hinted_solve_rate", "acceptance", "gentleness"), 0.5)
    rates |= {f"{when}_{what}": 0.5 for when in ("first", "last") for what in ("reward", "gentleness")}
    return {"set": name, "arm": arm, "seed": seed, "curves": curves, **rates}


def test_the_contrasts_are_differences_of_gains_paired_by_seed(tmp_path: Path) -> None:
    outcomes = [
        outcome(name, arm, seed, hard=0.5 + seed / 100 if arm == "privileged" else 0.1, dense=0.75)
        for name, arms in study.ARMS.items()
        for arm in arms
        for seed in range(1, 6)
    ]
    rows = {row["name"]: row for row in rows_of(outcomes, study.ARMS)}
    assert rows["privileged - blind, hard, smallest"]["differences"] == "0.410, 0.420, 0.430, 0.440, 0.450"
    assert rows["the same, hard - dense, smallest"]["value"] == pytest.approx(0.41)
    assert rows["the same, hard - dense, sign-flip p"]["value"] == 1 / 32
    assert rows["privileged - blind, dense, mean"]["value"] == 0
    assert rows["trained on both, blind: held-out dense prompts at the end"]["value"] == 0.75
    draw_privileged_sampling({"outcomes": outcomes}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size < 100_000
