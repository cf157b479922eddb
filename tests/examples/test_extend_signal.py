"""A signal of a user's own: from a backend in a real actor, over the wire, into the learner's micro-batch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from cluster.actors.cluster import PoolTimeouts
from cluster.actors.object_store import pack
from cluster.contracts.errors import ConfigError, ScoreError, TrajectoryError
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.signals import find_signal
from cluster.contracts.trajectory import add_scores, make_generated
from cluster.contracts.wire import from_wire, to_wire
from examples.extend.signal import PATH
from examples.extend.teacher_backend import SMOOTHING, write_table
from learner.batching.micro_batch import build_micro_batch, trajectories
from teacher_workers.pool import start_pool
from teacher_workers.router import TeacherRouter
from tests.builders import make_config, make_scores, make_trajectory

BACKEND = "examples.extend.signal:BigramsWithMargin"
TIMEOUTS = PoolTimeouts(start_seconds=300, call_seconds=120)


@pytest.mark.slow
def test_the_learner_sees_what_the_backend_said_of_each_sampled_token(tmp_path: Path, ray_cluster: None) -> None:
    write_table(tmp_path / "pairs.json", 5, [[0, 1]] * 3 + [[0, 2], [1, 4]])
    pairs = f"teachers.pairs.model={tmp_path / 'pairs.json'}"
    config = make_config(pairs, f"teachers.pairs.backend={BACKEND}", f'teachers.pairs.signals=["{PATH}"]')
    [(_, request)] = config.scorers("pairs")
    pool = start_pool("pairs", config.teachers["pairs"], 64, [{"num_cpus": 0}], TIMEOUTS)
    try:
        pool.wait_until_ready()
        rows = [make_trajectory(prompt=[3, 0], completion=[1, 4]), make_trajectory(prompt=[1], completion=[4])]
        wire, handle = pack(make_generated(rows), {})
        handle = replace(handle, reference=ray.put(wire))
        [scored] = TeacherRouter({"main": pool}, 60).score([handle], lambda route: [(route, request)])
        batch = from_wire(ray.get(scored.reference), "scored")
    finally:
        pool.shutdown()
    tokens = build_micro_batch(((0, 1),), trajectories([batch]), seed=0).tokens
    after_0 = np.log((3 + SMOOTHING) / (1 + SMOOTHING))  # 0 1 three times, 0 2 once
    after_1 = np.log((1 + SMOOTHING) / SMOOTHING)
    assert tokens.scores["teacher"]["margin"].tolist() == pytest.approx([after_0, after_1, after_1], abs=1e-6)
    assert tokens[1:].scores["teacher"]["margin"].tolist() == pytest.approx([after_1, after_1], abs=1e-6)


def test_a_signal_comes_back_from_the_wire_with_the_columns_of_every_batch() -> None:
    scores = {**make_scores(3), PATH: np.array([1, 2, 3], np.float32)}
    batch = from_wire(to_wire(add_scores(make_generated([make_trajectory()]), "teacher", scores)), "scored")
    assert batch["teacher_margin"].to_pylist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (np.ones(2, np.float32), r"teacher margin have shape \[2\], the batch needs \[3\]"),
        (np.array([1, np.nan, 1], np.float32), "teacher margin hold NaN"),
        (np.ones(3), "teacher margin are float64, expected float"),
    ],
)
def test_values_that_do_not_fit_the_signal_are_refused(values: np.ndarray, sentence: str) -> None:
    with pytest.raises(ScoreError, match=sentence):
        add_scores(make_generated([make_trajectory()]), "teacher", {**make_scores(3), PATH: values})


def test_a_column_that_no_signal_names_is_refused() -> None:
    scores = {**make_scores(3), PATH: np.ones(3, np.float32)}
    batch = add_scores(make_generated([make_trajectory()]), "teacher", scores)
    metadata = {key: value for key, value in batch.schema.metadata.items() if key != b"signals"}
    with pytest.raises(TrajectoryError, match=r"'teacher_margin: .* is unknown"):
        from_wire(to_wire(batch.replace_schema_metadata(metadata)))


def test_a_name_that_is_no_signal_is_an_error() -> None:
    with pytest.raises(ConfigError, match="there is no signal 'margin'"):
        find_signal("margin")
    with pytest.raises(ConfigError, match="expected a Signal whose name is none of"):
        find_signal("math:pi")


def test_requests_name_the_signals_of_their_teacher() -> None:
    config = make_config(f'teachers.main.signals=["{PATH}"]')
    assert PATH in config.scorers("main")[0][1].signals
    assert PATH not in ScoreRequest("teacher").signals
