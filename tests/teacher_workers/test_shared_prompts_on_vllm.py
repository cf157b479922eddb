"""A real vLLM teacher reads a prompt that several trajectories share once, and scores them as if it had not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from cluster.actors.object_store import pack
from cluster.contracts.batches import BatchHandle
from cluster.contracts.metrics import report
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import Ints, make_generated, ragged
from cluster.contracts.wire import from_wire
from teacher_workers.pool import TeacherPool
from teacher_workers.router import TeacherRouter
from tests.builders import make_trajectory
from tests.tiny_qwen3 import expected_logprobs, load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BLOCK = 128  # tokens of vLLM's cache block on CPU
TOLERANCE = 1e-4


@pytest.fixture
def teachers(pools: dict[str, TeacherPool]) -> TeacherRouter:
    return TeacherRouter({"main": pools["exact"]}, call_seconds=120)


def score(teachers: TeacherRouter, prompt: Ints, completions: list[Ints]) -> tuple[BatchHandle, list[np.ndarray]]:
    """Return the handle and each row's scores."""
    rows = [make_trajectory(prompt=prompt, completion=ids, teacher="main") for ids in completions]
    wire, handle = pack(make_generated(rows), {})
    handle = replace(handle, reference=ray.put(wire))
    [scored] = teachers.score([handle], lambda route: [(route, ScoreRequest("teacher"))])
    logprobs = ragged(from_wire(ray.get(scored.reference), "scored"), "teacher_logprobs")
    return scored, [logprobs[row] for row in range(len(completions))]


def assert_right(tiny_teacher: Path, prompt: Ints, completions: list[Ints], scores: list[np.ndarray]) -> None:
    model = load(tiny_teacher)
    for ids, found in zip(completions, scores, strict=True):
        logprobs = expected_logprobs(model, [*prompt.tolist(), *ids.tolist()])[len(prompt) - 1 :].numpy()
        assert np.abs(found - logprobs[np.arange(len(ids)), ids]).max() < TOLERANCE


def draw(seed: int, count: int) -> Ints:
    return np.random.default_rng(seed).integers(4, 112, count).astype(np.int32)


def test_the_samples_of_a_prompt_share_its_whole_blocks(teachers: TeacherRouter, tiny_teacher: Path) -> None:
    prompt, completions = draw(0, 2 * BLOCK + 50), [draw(seed, 30) for seed in (1, 2, 3, 4)]
    scored, found = score(teachers, prompt, completions)
    assert_right(tiny_teacher, prompt, completions, found)
    # All but the first sample found two blocks.
    expected = 3 * 2 * BLOCK / (4 * (len(prompt) + 30))
    assert report(scored.metrics)["teacher/prefix_hit_ratio"] == pytest.approx(expected)


@pytest.mark.parametrize("prompt_tokens", [BLOCK, BLOCK - 20], ids=["prompt-ends-with-block", "completions-alike"])
def test_a_cached_block_that_holds_a_needed_position_is_computed_again(
    teachers: TeacherRouter, tiny_teacher: Path, prompt_tokens: int
) -> None:
    prompt, start = draw(10 + prompt_tokens, prompt_tokens), draw(5, 40)
    completions = [np.concatenate([start, draw(seed, 10)]) for seed in (6, 7)]
    scored, found = score(teachers, prompt, completions)
    assert_right(tiny_teacher, prompt, completions, found)
    assert report(scored.metrics)["teacher/prefix_hit_ratio"] == 0
