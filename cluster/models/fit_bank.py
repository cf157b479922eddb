"""Fits a projection bank in closed form: principal components of the teacher, least squares for the student.

The bank is that of OPRD-Bridge, whose student side is trained by Adam without a bias. Here it has the exact minimum,
and both sides are taken from their means.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.contracts.errors import ModelError
from cluster.models.hidden_layers import ProjectionBank

HELD_OUT_SHARE = 0.1  # of the rows, at the end, on which the student's map is measured
SMALLEST_SHARE = 1e-10  # of the largest eigenvalue: smaller ones are rounding, and are not divided by


@dataclass(frozen=True)
class LayerFit:
    """Says how much of one pair of layers a bank keeps."""

    student_layer: int
    teacher_layer: int
    teacher_share: float  # of the teacher's variance that its components hold, on the rows that they were fitted to
    student_share: float  # of those components' variance that the student's map explains, on held-out rows


def fit_bank(
    student: Mapping[int, Tensor],
    teacher: Mapping[int, Tensor],
    pairs: Mapping[int, int],
    depths: tuple[int, int],
    rank: int,
) -> tuple[ProjectionBank, list[LayerFit]]:
    """Fit a bank to the states of both models at the same rows.

    Args:
        student: layer -> [rows, width], of the layers in `pairs`.
        teacher: the same of its own width.
        pairs: the student's layer -> the teacher's.
        depths: layers of student and teacher.
        rank: dimensions that are kept of each layer.

    Raises:
        ModelError: there are too few rows, or the rank exceeds a width.
    """
    num_rows = len(next(iter(student.values())))
    fitted = num_rows - max(1, round(num_rows * HELD_OUT_SHARE))
    widths = {values.shape[1] for values in (*student.values(), *teacher.values())}
    if fitted <= rank or rank > min(widths):
        raise ModelError(
            f"a projection of rank {rank} cannot be fitted to {num_rows} rows of states that are {min(widths)} wide; "
            "lower --rank, or take more prompts"
        )
    sides, fits = [], []
    for of_student, of_teacher in pairs.items():
        ours, theirs = (values.double() for values in (student[of_student], teacher[of_teacher]))
        mean_of_ours, mean_of_theirs = (values[:fitted].mean(0) for values in (ours, theirs))
        ours, theirs = ours - mean_of_ours, theirs - mean_of_theirs
        components, teacher_share = principal_components(theirs[:fitted], rank)
        targets = theirs @ components.T
        projection = least_squares(ours[:fitted], targets[:fitted])
        missed = (targets - ours @ projection.T)[fitted:].square().sum()
        student_share = 1.0 - float(missed / targets[fitted:].square().sum().clamp(min=1e-30))
        fits.append(LayerFit(of_student, of_teacher, teacher_share, student_share))
        sides.append((projection, components, mean_of_ours, mean_of_theirs))
    projections, components, means_of_ours, means_of_theirs = (
        torch.stack(part).float() for part in zip(*sides, strict=True)
    )
    bank = ProjectionBank(
        {"student": tuple(pairs), "teacher": tuple(pairs.values())},
        {"student": depths[0], "teacher": depths[1]},
        {"student": projections, "teacher": components},
        {"student": means_of_ours, "teacher": means_of_theirs},
    )
    return bank, fits


def principal_components(centred: Tensor, rank: int) -> tuple[Tensor, float]:
    """Return the directions [rank, width] of the largest variance, orthonormal, and their share of all variance.

    Each direction's largest entry is positive, so that the same rows give the same bank.
    """
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    components = vectors[:, -rank:].flip(1).T
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return components * largest.sign(), float(values[-rank:].sum() / values.sum().clamp(min=1e-30))


def least_squares(inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the map [outputs, width] of least squared error from inputs [rows, width] to targets [rows, outputs].

    Of several, it is the smallest: directions that the inputs do not have are mapped to 0.
    """
    values, vectors = torch.linalg.eigh(inputs.T @ inputs)
    kept = values > SMALLEST_SHARE * values[-1]
    basis = vectors[:, kept]
    return ((basis / values[kept]) @ (basis.T @ (inputs.T @ targets))).T
