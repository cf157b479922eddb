"""A bank holds the teacher's principal components, and the student's map of least squared error onto them."""

import pytest
import torch
from torch import Tensor

from cluster.contracts.errors import ModelError
from cluster.models.fit_bank import fit_bank, least_squares, principal_components

ROWS, STUDENT, TEACHER = 400, 6, 10


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    centred = random(ROWS, TEACHER, seed=0) * torch.arange(1, TEACHER + 1)
    centred = centred - centred.mean(0)
    components, share = principal_components(centred, 3)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    assert torch.allclose((components * vectors[:3]).sum(-1).abs(), torch.ones(3).double())
    assert torch.allclose(components @ components.T, torch.eye(3).double(), atol=1e-12)
    assert share == pytest.approx(float(values[:3].square().sum() / values.square().sum()))


def test_the_students_map_is_that_of_least_squares_and_the_smallest_of_several() -> None:
    inputs, targets = random(ROWS, STUDENT, seed=1), random(ROWS, 3, seed=2)
    inputs = torch.cat([inputs, inputs[:, :1]], 1)  # a column twice: many maps are as good
    found = least_squares(inputs, targets)
    expected = torch.linalg.lstsq(inputs, targets, driver="gelsd").solution.T
    assert torch.allclose(found, expected, atol=1e-9)


def test_a_student_that_holds_the_teachers_components_is_mapped_onto_them_exactly() -> None:
    hidden = random(ROWS, 3, seed=3)
    teacher = hidden @ random(3, TEACHER, seed=4) + random(TEACHER, seed=5)
    student = hidden @ random(3, STUDENT, seed=6) - random(STUDENT, seed=7)
    bank, (fit,) = fit_bank({2: student}, {5: teacher}, {2: 5}, (4, 8), rank=3)
    assert fit.teacher_share == pytest.approx(1.0)
    assert fit.student_share == pytest.approx(1.0)
    ours, theirs = bank.project("student", 2, student), bank.project("teacher", 5, teacher)
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert (bank.rank, bank.width("student"), bank.width("teacher")) == (3, STUDENT, TEACHER)


def test_noise_is_not_explained_and_the_same_rows_give_the_same_bank() -> None:
    student, teacher = random(ROWS, STUDENT, seed=8), random(ROWS, TEACHER, seed=9)
    first, (fit,) = fit_bank({1: student}, {1: teacher}, {1: 1}, (1, 1), rank=2)
    assert fit.student_share < 0.1
    assert first.digest == fit_bank({1: student}, {1: teacher}, {1: 1}, (1, 1), rank=2)[0].digest


def test_too_few_rows_or_too_high_a_rank_are_refused() -> None:
    student, teacher = random(8, STUDENT, seed=8), random(8, TEACHER, seed=9)
    with pytest.raises(ModelError, match="rank 7 cannot be fitted to 8 rows of states that are 6 wide"):
        fit_bank({1: student}, {1: teacher}, {1: 1}, (1, 1), rank=7)
