import subprocess
import sys
from pathlib import Path

from benchmarks.harness.model_pairs import PAIRS, ROOT, missing_models, pair_config


def test_an_override_changes_what_the_pair_trains() -> None:
    assert pair_config("embedded").rollout.max_completion_tokens == 48
    assert pair_config("embedded", ["rollout.max_completion_tokens=112"]).rollout.max_completion_tokens == 112
    assert pair_config("smollm2", ["prompts.prompts_per_step=16"]).prompts.prompts_per_step == 16


def test_the_pairs_load_nothing_that_trl_has_no_need_of() -> None:
    heavy = "{'ray', 'vllm', 'deepspeed', 'torch'}"
    code = f"import sys, benchmarks.harness.model_pairs; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_pair_without_its_models_says_which_and_how_to_make_them(tmp_path: Path) -> None:
    first, second = PAIRS["smollm2"].models
    (tmp_path / first).mkdir(parents=True)
    (tmp_path / first / "config.json").touch()
    sentence = missing_models("smollm2", tmp_path)
    assert sentence is not None
    assert second in sentence
    assert first not in sentence
    assert "examples.smollm2.drop_layers" in sentence
    assert missing_models("embedded", tmp_path) is None
