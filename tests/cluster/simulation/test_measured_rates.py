import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cluster.config.run_file import dump_run_config
from cluster.contracts.batches import Span
from cluster.contracts.errors import ConfigError
from cluster.monitoring.trace import timeline
from cluster.simulation.measured_rates import makespan, rates_from, rates_of_run, rollouts_of
from cluster.simulation.rates import Rates
from tests.builders import make_config

ALONE, PER_RUNNING = 0.01, 0.002  # seconds per token that the written calls below show
RECORD = {
    "step": 3,
    "tokens": 1300.0,
    "completion_tokens": 1000.0,
    "rollout/completion_length": 100.0,
    "rollout/completion_length_max": 250.0,
    "learn/tokens_per_second": 8000.0,
    "sync/seconds": 0.5,
}


def rollout(step: int, worker: int, began: float, lengths: Sequence[int]) -> list[Span]:
    """Return the calls of one rollout whose rows all run from the start, each of them a full batch."""
    spans, asked = [], began
    for length in sorted(lengths):
        tokens = sum(min(other, length) for other in lengths)
        ended = began + ALONE * length + PER_RUNNING * tokens
        spans.append(Span("rollout", f"rollout-{worker}", "generate", asked, ended, 1, length, step, (length,)))
        asked = ended + 0.0002
    return spans


def scored(began: float, tokens: int, seconds: float) -> Span:
    return Span("teacher-main", "teacher-main-0", "score", began, began + seconds, 1, tokens)


def a_runs_spans() -> list[Span]:
    random = np.random.default_rng(0)
    written = [
        span
        for step in range(4)
        for worker in range(3)
        for span in rollout(
            step, worker, 100.0 * step, random.choice(np.arange(20, 250), 30 + 4 * step, replace=False).tolist()
        )
    ]
    # A batch takes 0.1 s, and a token 0.5 ms.
    # 1300 tokens of which a group of 8000 per second learns in 0.1625 s, 0.0625 s of which is the update.
    learned = [Span("learner", "learner-0", *call) for call in (("learn", 5.0, 5.1), ("learn", 5.1, 5.1625))]
    synced = Span("learner", "learner-0", "sync", 5.17, 5.67)
    return [*written, *learned, synced, scored(0.0, 400, 0.3), scored(1.0, 1000, 0.6), scored(2.0, 200, 0.2)]


def rates_of_spans(spans: Sequence[Span], tmp_path: Path, *overrides: str) -> Rates:
    """Write a run's directory, and read the rates off it."""
    config = make_config("rollout.rows_per_batch=1", "learner.num_workers=2", *overrides)
    (tmp_path / "config.json").write_text(dump_run_config(config))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({**RECORD, "step": step}) + "\n" for step in (1, 2, 3)))
    (tmp_path / "trace.json").write_text(json.dumps(timeline(spans)))
    return rates_of_run(tmp_path)


def test_the_pace_of_an_engine_is_found_for_one_and_for_many_sequences(tmp_path: Path) -> None:
    (one, alone), (many, crowded) = rates_of_spans(a_runs_spans(), tmp_path).rollout.seconds_per_token
    assert (one, many) == (1, 42)
    assert alone == pytest.approx(ALONE + PER_RUNNING, rel=0.02)  # 0.2 ms pass before each next call
    assert crowded == pytest.approx(ALONE + 42 * PER_RUNNING, rel=0.02)


def test_the_other_rates_are_read_off_too(tmp_path: Path) -> None:
    rates = rates_of_spans(a_runs_spans(), tmp_path)
    assert rates.teachers["main"].tokens_per_second == pytest.approx(2000.0, rel=1e-3)
    assert rates.teachers["main"].seconds_per_pass == pytest.approx(0.1, rel=1e-3)
    assert rates.learner.optimizer_seconds == pytest.approx(0.0625)
    assert rates.learner.tokens_per_second == pytest.approx(1300 / 0.1 / 2)  # of each of two ranks
    assert rates.sync_seconds == 0.5
    assert rates.rollout.prompt_tokens == (30.0,)  # 300 tokens of 10 rows
    assert rates.rollout.completion_tokens[-1] == 250.0  # type: ignore[index]


def test_calls_of_one_rollout_belong_together_however_late_the_next_one_was_asked() -> None:
    calls = [("rollout-0", 7, 0, 1), ("rollout-0", 8, 0.5, 2), ("rollout-0", 7, 1.3, 3), ("rollout-1", 7, 3, 4)]
    spans = [Span("rollout", worker, "generate", began, ended, 1, 10, step) for worker, step, began, ended in calls]
    assert [[span.began for span in chain.batches] for chain in rollouts_of(spans)] == [[0, 1.3], [0.5], [3]]


def test_full_engines_give_the_pace_at_their_limit(tmp_path: Path) -> None:
    # Four sequences of 100 tokens, two at a time, in 4 s.
    spans = [Span("rollout", "rollout-0", "generate", 0.0, 4.0, 4, 400, 0, (100,) * 4), scored(4.0, 400, 0.4)]
    rates = rates_of_spans(spans, tmp_path, "rollout.engine.max_concurrent_sequences=2")
    assert rates.rollout.seconds_per_token == ((2, pytest.approx(0.02)),)


def test_a_makespan_is_at_least_the_longest_and_the_mean_load() -> None:
    lengths = [10, 20, 30, 100]
    found = makespan(lengths, 2, np.random.default_rng(0))
    assert max(100, sum(lengths) / 2) <= found <= 100 + (sum(lengths) - 100) / 2


def test_a_run_that_was_too_short_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run: 0 steps and 0 traced rollouts are too few .* run 3 steps or more"):
        rates_from(make_config(), [], [], "run")


def test_a_teacher_that_scored_nothing_is_named(tmp_path: Path) -> None:
    spans = [span for span in a_runs_spans() if span.pool == "rollout"]
    with pytest.raises(ConfigError, match="no batch that teacher 'main' scored"):
        rates_of_spans(spans, tmp_path)


def test_rates_are_not_read_off_steps_that_overlap(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_staleness is 2; read them off a run with 0"):
        rates_of_spans(a_runs_spans(), tmp_path, "rollout.max_staleness=2")


def test_a_teachers_calls_are_known_by_its_name_whatever_its_workers_are_called(tmp_path: Path) -> None:
    later = Span("teacher-main", "teacher-main@3f9a01-0", "score", 3.0, 4.0, 2, 1000)  # of another checkpoint
    spans = [Span("rollout", "rollout-0", "generate", 0.0, 1.0, 1, 100, 0, (100,)), later]
    assert rates_of_spans(spans, tmp_path).teachers["main"].tokens_per_second == pytest.approx(1000.0, rel=1e-3)


def test_rates_are_not_read_off_teachers_that_wait_for_their_turns(tmp_path: Path) -> None:
    slots = ("teachers.main.slot=s", "teachers.code={model='c',slot='s'}")
    with pytest.raises(ConfigError, match=r"wait for their turns, and main and code share a slot; read them off"):
        rates_of_spans(a_runs_spans(), tmp_path, *slots)


def test_every_completions_length_counts(tmp_path: Path) -> None:
    # At 30 tokens 10 + 3 x 30 are written, at 70 all 160: 0.01 x 30 + 0.002 x 100 and 0.01 x 70 + 0.002 x 160 seconds.
    calls = [(0.0, 0.5, (10, 30)), (0.6, 1.02, (70, 50))]
    written = [
        Span("rollout", "rollout-0", "generate", began, ended, 2, sum(lengths), 7, lengths)
        for began, ended, lengths in calls
    ]
    rates = rates_of_spans([*written, scored(2.0, 400, 0.4)], tmp_path, "rollout.rows_per_batch=2").rollout
    assert rates.completion_tokens == (10.0, 30.0, 50.0, 250.0)  # 250 is the longest of the run's figures
    (one, alone), (four, crowded) = rates.seconds_per_token
    assert (one, four) == (1, 4)
    assert (alone, crowded) == (pytest.approx(0.012), pytest.approx(0.018))


def test_the_pace_of_a_full_engine_follows_from_its_longest_completion(tmp_path: Path) -> None:
    # Two at a time; the longest begins first, or after one of the others: 97 or 98 tokens in 1.95 s.
    written = Span("rollout", "rollout-0", "generate", 0.0, 1.95, 4, 100, 7, (1, 1, 1, 97))
    spans = [written, scored(2.0, 400, 0.4)]
    [(_, pace)] = rates_of_spans(spans, tmp_path, "rollout.engine.max_concurrent_sequences=2").rollout.seconds_per_token
    assert pace == pytest.approx(0.02, rel=0.01)


def test_a_trace_with_nonsense_for_lengths_is_refused_in_one_sentence(tmp_path: Path) -> None:
    rates_of_spans(a_runs_spans(), tmp_path)
    trace = tmp_path / "trace.json"
    trace.write_text(trace.read_text().replace('"rollout": 0', '"lengths": ["long"]', 1))
    with pytest.raises(ConfigError, match=r"not what a run writes: Expected `int`, got `str` .*lengths"):
        rates_of_run(tmp_path)
