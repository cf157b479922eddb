"""The staleness study varies what it says, and does no run twice."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cases.staleness import Cell, Outcome, append_outcome, missing, read_outcomes, study_rows
from cluster.config.run_config import Config
from cluster.config.terms import DivergenceTerm, ImportanceConfig, PolicyGradientTerm

CELL = Cell("frozen", max_staleness=4, seed=1, steps=60, learning_rate=2e-3)
OUTCOME = Outcome(CELL, 0.4, 0.9, 1.0, 0.1, mean_staleness=3.0, largest_staleness=4, num_completion_tokens=9, seconds=2)


def test_the_two_policy_gradients_differ_in_the_students_log_probability_alone() -> None:
    frozen, recomputed = CELL.config(), replace(CELL, objective="recomputed").config()
    assert frozen.objective.terms["main"] == PolicyGradientTerm(student="rollout", importance=ImportanceConfig("ratio"))
    assert recomputed.objective.terms["main"] == PolicyGradientTerm(student="current")
    assert {**vars_of(frozen), "objective": None} == {**vars_of(recomputed), "objective": None}


def vars_of(config: Config) -> dict[str, object]:
    return {name: getattr(config, name) for name in config.__struct_fields__}


def test_forward_kl_is_taken_over_the_teachers_tokens_with_a_tail() -> None:
    objective = replace(CELL, objective="forward").config().objective
    assert (objective.support, objective.needs.candidates_from) == ("topk", "teacher")
    assert objective.terms["main"] == DivergenceTerm(divergence="forward_kl", truncation="tail")


def test_a_cell_sets_what_it_names() -> None:
    config = CELL.config("run.name=one")
    assert (config.rollout.max_staleness, config.run.seed, config.run.steps) == (4, 1, 60)
    assert (config.learner.learning_rate, config.run.name) == (2e-3, "one")


def test_a_finished_run_is_not_done_again_but_one_at_another_rate_is(tmp_path: Path) -> None:
    log = tmp_path / "study.jsonl"
    append_outcome(log, OUTCOME)
    faster = replace(CELL, learning_rate=1e-2)
    assert read_outcomes(log) == [OUTCOME]
    assert missing([CELL, faster], read_outcomes(log)) == [faster]


def test_without_a_file_everything_is_missing(tmp_path: Path) -> None:
    assert missing([CELL], read_outcomes(tmp_path / "none.jsonl")) == [CELL]


def test_the_trend_is_points_of_accuracy_per_doubling_of_staleness_plus_one() -> None:
    fresh = replace(OUTCOME, cell=replace(CELL, max_staleness=0), mean_staleness=0.0, last_accuracy=0.95)
    rows = {row["name"]: row["value"] for row in study_rows([fresh, OUTCOME])}
    # From staleness 0 to 3 is two doublings of 1, and 5 points.
    assert rows["staleness: reverse KL, frozen: accuracy per doubling"] == pytest.approx(-2.5)


def test_a_cell_is_the_mean_of_its_seeds() -> None:
    other = replace(OUTCOME, cell=replace(CELL, seed=2), last_accuracy=0.8, largest_staleness=3)
    rows = {row["name"]: row for row in study_rows([OUTCOME, other])}
    accuracy = rows["staleness: reverse KL, frozen: held-out accuracy after"]
    assert accuracy["value"] == pytest.approx(0.85)
    assert accuracy["size"] == "max_staleness 4, 60 steps, 2 seeds"
    assert rows["staleness: reverse KL, frozen: largest staleness"]["value"] == 4
