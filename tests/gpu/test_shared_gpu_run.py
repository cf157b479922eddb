"""All stages of a run on one card: the demo's command with `ray.share_gpu`."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.runs import preceptor

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 6
BFLOAT16 = ("rollout.engine.dtype=bfloat16", "teachers.countdown.engine.dtype=bfloat16", "learner.dtype=bfloat16")
# Between the rollout engine and the learner. vLLM 0.24 rounds its logits to bfloat16, the learner does not: that alone
# is 0.02 nats (benchmarks/gpu_parts/loop.py).
NATS = {"float32": 1e-3, "bfloat16": 0.03}


@pytest.mark.parametrize(("dtype", "sleep"), [("float32", "false"), ("bfloat16", "false"), ("bfloat16", "true")])
def test_generator_teacher_and_learner_share_a_card(tmp_path: Path, dtype: str, sleep: str) -> None:
    found = preceptor(
        "demo",
        "ray.share_gpu=true",
        f"rollout.engine.sleep={sleep}",
        "ray.dashboard=false",
        f"run.directory={tmp_path}",
        "run.name=shared",
        f"run.steps={STEPS}",
        "learner.warmup_steps=1",
        "evaluation.num_prompts=64",
        *(BFLOAT16 if dtype == "bfloat16" else ()),
    )
    assert found.code == 0, found.error
    records = [json.loads(line) for line in (tmp_path / "shared" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        # Every step's completions were written with the weights of the sync before: what it brought is what it sent.
        assert record["train/sampler_learner_gap"] < NATS[dtype]
        assert record["teacher/scored_tokens"] == record["rollout/tokens"]
    line = next(line for line in found.output.splitlines() if line.startswith("KL to the teacher per token"))
    before, after = (float(value) for value in line.split(": ")[1].split(" -> "))
    assert after < before
