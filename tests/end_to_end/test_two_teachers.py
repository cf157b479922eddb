"""Prompts of two domains, each scored by its own teacher, in one step of one student; ZeRO stage 3; then a kill."""

import json
import signal
from pathlib import Path

import pytest

from cluster.demo import EMBEDDED
from tests.end_to_end.runs import ENDED_SECONDS, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("preloaded")]

# Two different models: the embedded teacher, and the student as it was before training.
RUN_FILE = f"""
[student]
model = "{EMBEDDED / "student"}"
[teachers.better]
model = "{EMBEDDED / "teacher"}"
engine = {{ dtype = "float32", kv_cache_gib = 0.25 }}
[teachers.itself]
model = "{EMBEDDED / "student"}"
engine = {{ dtype = "float32", kv_cache_gib = 0.25 }}
[teachers.itself.context]  # waits for the other completion of the prompt, and says no more than the prompt
template = "{{% if attempts %}}{{{{ prompt }}}}{{% endif %}}"
compared_rows = 1.0
[prompts]
template = "raw"
train = "TRAIN"
[rollout]
max_completion_tokens = 48
samples_per_prompt = 2
engine = {{ dtype = "float32", kv_cache_gib = 0.25 }}
[objective]
preset = "thinking-machines"
[learner]
zero_stage = 3
dtype = "float32"
learning_rate = 1e-3
[environment]
verifier = "regex"
"""


def test_each_prompt_is_scored_by_the_teacher_that_it_names_and_nothing_stays_of_a_killed_run(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (EMBEDDED / "train.jsonl").read_text().splitlines()[:64]]
    routed = [{**line, "teacher": ("better", "itself")[i % 2]} for i, line in enumerate(lines)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in routed))
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN_FILE.replace("TRAIN", str(tmp_path / "train.jsonl")))
    command = ("train", str(run_file))
    with running(tmp_path, "run.steps=100000", "ray.dashboard=false", command=command, is_forked=True) as run:
        run.wait_for("step 2 ")
        run.process.kill()
        assert run.process.wait(ENDED_SECONDS) == -signal.SIGKILL
        assert run.left() == []
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert first["teacher/better/sampled_kl"] > 0.5
    # On the first step the student still is its second teacher, whose context is the prompt.
    assert abs(first["teacher/itself/sampled_kl"]) < 1e-3
    assert abs(first["teacher/context_kl"]) < 1e-5
    assert (first["context/missing_rows"], first["context/tokens"] > 5) == (0, True)
