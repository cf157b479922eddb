"""The TRL side of the comparison is asked for what our own loop is asked for; TRL itself is not needed here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.model_pairs import pair_config
from benchmarks.trl.environment import LOCK, STAMP, environment_key, make_environment
from benchmarks.trl.steps import StepRecorder, step_prompts
from cluster.models.model_files import load_tokenizer
from cluster.run.inputs import load_inputs, train_requests


def test_each_step_asks_the_prompts_that_our_own_loop_asks_in_its_order() -> None:
    config = pair_config("embedded")
    count = config.prompts.prompts_per_step
    asked = step_prompts(config, 2, load_tokenizer(config.student.model), context_tokens=128)
    inputs = load_inputs(config)
    for step in range(2):
        ours = [
            inputs.prompts.prompt(request.prompt_id).token_ids.tolist()
            for request in train_requests(config, inputs, step)
        ]
        assert [prompt.token_ids for prompt in asked[step * count : (step + 1) * count]] == ours


def test_the_loss_of_a_step_is_the_mean_over_the_tokens_of_all_its_forwards(tmp_path: Path) -> None:
    recorder = StepRecorder(tmp_path / "steps.jsonl")
    recorder.add(1.0, [1], prompt_tokens=5)
    recorder.add(4.0, [2, 3], prompt_tokens=7)
    recorder.end_step()
    recorder.add(2.0, [4], prompt_tokens=1)
    recorder.end_step()
    first, second = (json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines())
    assert first["loss"] == pytest.approx((1.0 * 1 + 4.0 * 5) / 6)
    assert (first["step"], first["completion_tokens"], first["longest_completion_tokens"]) == (0, 6, 3)
    assert first["prompt_tokens"] == 12
    assert (second["step"], second["completion_tokens"], second["loss"]) == (1, 4, 2.0)


def test_torch_is_not_loaded_before_its_threads_are_set() -> None:
    code = "import sys, benchmarks.trl.baseline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=LOCK.parents[2]).returncode == 0


def test_a_finished_environment_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / STAMP).write_text(environment_key())
    assert make_environment(tmp_path) == tmp_path / "bin/python"
    assert [path.name for path in tmp_path.iterdir()] == [STAMP]
