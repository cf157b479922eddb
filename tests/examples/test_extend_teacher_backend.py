"""A teacher that is no model folder: scores by hand, in a real actor."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from cluster.actors.cluster import PoolTimeouts
from cluster.actors.object_store import pack
from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ConfigError, ModelError
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import make_generated, ragged
from cluster.contracts.wire import from_wire
from cluster.demo import EMBEDDED, embedded_config
from cluster.models.model_files import load_tokenizer
from cluster.run.inputs import load_inputs
from examples.extend.teacher_backend import SMOOTHING, write_table
from teacher_workers.pool import start_pool
from teacher_workers.router import TeacherRouter
from tests.builders import make_trajectory

BACKEND = "examples.extend.teacher_backend:Bigrams"
TIMEOUTS = PoolTimeouts(start_seconds=300, call_seconds=120)


def share(count: int, total: int, vocabulary: int) -> float:
    return float(np.log((count + SMOOTHING) / (total + SMOOTHING * vocabulary)))


@pytest.mark.slow
def test_two_sampled_spans_of_a_row_are_scored_by_the_token_before_each_of_theirs(
    tmp_path: Path, ray_cluster: None
) -> None:
    write_table(tmp_path / "pairs.json", 5, [[0, 1, 2], [0, 1, 3], [3, 1]])
    teacher = TeacherConfig(str(tmp_path / "pairs.json"), backend=BACKEND)
    pool = start_pool("pairs", teacher, 64, [{"num_cpus": 0}], TIMEOUTS)
    try:
        pool.wait_until_ready()
        row = make_trajectory(
            token_ids=np.array([0, 1, 2, 3, 1, 3], np.int32),
            loss_mask=np.array([0, 1, 1, 0, 0, 1], np.uint8),
            rollout_logprobs=np.full(3, -1, np.float32),
        )
        wire, handle = pack(make_generated([row]), {})
        handle = replace(handle, reference=ray.put(wire))
        request = ScoreRequest("teacher", top_k=1, entropy=True)
        [scored] = TeacherRouter({"main": pool}, 60).score([handle], lambda route: [(route, request)])
        batch = from_wire(ray.get(scored.reference), "scored")
    finally:
        pool.shutdown()
    # Pairs seen: 0 1 twice, 1 2 once, 1 3 once, 3 1 once.
    expected = [share(2, 2, 5), share(1, 2, 5), share(1, 2, 5)]
    assert ragged(batch, "teacher_logprobs")[0] == pytest.approx(expected, abs=1e-6)
    assert ragged(batch, "candidate_ids")[0].tolist() == [[1], [2], [2]]
    assert ragged(batch, "teacher_candidate_logprobs")[0][:, 0] == pytest.approx(expected, abs=1e-6)


def overrides(table: Path) -> list[str]:
    return [f"teachers.countdown.backend={BACKEND}", f"teachers.countdown.model={table}"]


def write_demo_table(path: Path) -> Path:
    """Count the pairs of the demo's prompts, in the student's tokens."""
    tokenizer = load_tokenizer(str(EMBEDDED / "student"), trust_remote_code=False)
    prompts = [json.loads(line)["prompt"] for line in (EMBEDDED / "train.jsonl").read_text().splitlines()]
    write_table(path, 112, [tokenizer(prompt)["input_ids"] for prompt in prompts])
    return path


def test_an_objective_that_needs_what_the_backend_does_not_send_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    table = write_demo_table(tmp_path / "pairs.json")
    with pytest.raises(ConfigError, match=r"teachers.countdown: its backend '.*' does not send hidden"):
        load_inputs(embedded_config([*overrides(table), "objective=gkd"]))


def test_a_table_without_the_student_s_tokens_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "pairs.json", 5, [])
    with pytest.raises(ModelError, match="has 5 tokens, and the student"):
        load_inputs(embedded_config(overrides(tmp_path / "pairs.json")))
