"""What is compared with what; the programs themselves are replaced by figures of theirs."""

from collections.abc import Sequence

import pytest

from benchmarks.cases.end_to_end import DISTILLATION, GKD, OURS, SPINNING_GKD, comparison_rows, measure
from benchmarks.harness import runners
from benchmarks.harness.model_pairs import SMOLLM2_RUN_FILE, pair_config
from benchmarks.harness.runners import Measured, Runner, Span
from cluster.config.run_file import load_run_config

STRICT, STALE = (runner.name for runner in OURS)


def measured(seconds: float, tokens: int = 600, steps: int = 3, cpu_seconds: float = 1.2) -> Measured:
    return Measured(steps, seconds, cpu_seconds, tokens, longest_tokens=112, load_average=0.25)


def test_all_take_part_in_the_first_round_and_the_fastest_of_trl_in_the_others() -> None:
    seconds = {GKD: 4.0, SPINNING_GKD: 3.0, DISTILLATION: 5.0}
    order: list[Runner] = []

    def run(runner: Runner) -> Measured:
        order.append(runner)
        return measured(seconds.get(runner, 1.0))

    results = measure((GKD, SPINNING_GKD, DISTILLATION), 3, run)
    assert order == [*OURS, GKD, SPINNING_GKD, DISTILLATION] + 2 * [*OURS, SPINNING_GKD]
    assert [len(results[runner.name]) for runner in (*OURS, GKD, SPINNING_GKD)] == [3, 3, 1, 3]


@pytest.mark.parametrize("lacks_bfloat16", [True, False])
def test_both_sides_train_in_the_same_dtypes(monkeypatch: pytest.MonkeyPatch, lacks_bfloat16: bool) -> None:
    monkeypatch.setattr("cluster.models.lm_head.lacks_bfloat16", lambda: lacks_bfloat16)
    commands: list[Sequence[str]] = []
    monkeypatch.setattr(runners, "_run_preceptor", lambda pair, span, overrides, folder: commands.append(overrides))
    OURS[0].run("smollm2", Span(1, 1), [])
    as_typed = load_run_config(SMOLLM2_RUN_FILE, commands[0])
    theirs = pair_config("smollm2")
    assert as_typed.learner.dtype == theirs.learner.dtype
    assert as_typed.rollout.engine.dtype == theirs.rollout.engine.dtype
    assert as_typed.teachers["smollm2"].engine.dtype == theirs.teachers["smollm2"].engine.dtype
    assert (as_typed.learner.dtype == "float32") == lacks_bfloat16


def test_the_ratio_is_the_median_of_what_each_round_found() -> None:
    results = {
        STRICT: [measured(1.0), measured(2.0), measured(1.0)],
        STALE: [measured(1.0)] * 3,
        GKD.name: [measured(2.0), measured(2.0), measured(9.0)],
        DISTILLATION.name: [measured(3.0)],
    }
    rows = {found["name"]: found for found in comparison_rows(results, "tiny")}
    ratio = rows[f"end to end: {STRICT} / {GKD.name}"]  # 2, 1 and 9
    assert (ratio["value"], ratio["min"], ratio["max"], ratio["bar"], ratio["met"]) == (2.0, 1.0, 9.0, ">= 2", True)
    assert f"end to end: {STRICT} / {DISTILLATION.name}" not in rows


def test_a_contenders_rows_are_medians_per_second_per_1000_tokens_and_per_step() -> None:
    results = {
        STRICT: [measured(1.0), measured(2.0), measured(3.0)],
        STALE: [measured(1.0)] * 3,
        GKD.name: [measured(2.0)] * 3,
    }
    rows = {found["name"]: found for found in comparison_rows(results, "tiny")}
    speed = rows[f"end to end: {STRICT}"]
    assert (speed["value"], speed["min"], speed["max"], speed["unit"]) == (300.0, 200.0, 600.0, "tokens/s")
    assert speed["load_averages"] == [0.25, 0.25, 0.25]
    assert rows[f"end to end: {STRICT}, CPU per 1,000 tokens"]["value"] == pytest.approx(2.0)
    assert rows[f"end to end: {STRICT}, tokens per step"]["value"] == 200


def test_a_run_has_its_own_length_and_at_least_more_steps_after_the_measured_ones_than_it_may_run_ahead() -> None:
    span = Span(warm_up=5, steps=20)
    assert [span.run_steps(60), span.run_steps(25), span.run_steps(8)] == [60, 28, 28]
