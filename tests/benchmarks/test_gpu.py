"""The card's benchmark: its models' shapes, its arithmetic, its time limits, and a dry run of all of it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import bare_checkout
from benchmarks.cases.stages import DRIVER_AND_RAY, Alone, Spent, Together
from benchmarks.gpu import ALL_SECONDS, PARTS, Kept, measure_part, share_of_time
from benchmarks.gpu_parts.learning import long_tailed_batch
from benchmarks.gpu_parts.loop import MAX_GAP_NATS, sampler_rows, stage_rows, streaming_rows
from benchmarks.gpu_parts.shapes import (
    EOS,
    LOGIT_DEVIATION,
    QWEN3_06B,
    QWEN3_8B,
    QWEN3_17B,
    TINY_STUDENT,
    VOCABULARY,
    card_scale,
    dry_scale,
    end_by_chance,
    qwen3_config,
)
from benchmarks.harness.model_pairs import ROOT
from tests.gpu.conftest import NEEDS

STAGE_SECONDS = {"generate": 2.0, "score": 1.0, "learn": 1.5, "sync": 0.5}


@pytest.mark.parametrize(
    ("shape", "billions"),  # as the models' cards give them, all parameters and those beside the embeddings
    [(QWEN3_06B, (0.6, 0.44)), (QWEN3_17B, (1.7, 1.4)), (QWEN3_8B, (8.2, 6.95))],
)
def test_models_have_the_published_numbers_of_parameters(shape, billions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(qwen3_config(shape))
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total / 1e9 == pytest.approx(billions[0], rel=0.02)
    assert (total - embeddings) / 1e9 == pytest.approx(billions[1], rel=0.02)


@pytest.mark.parametrize("tied", [True, False])
def test_every_place_ends_the_text_with_about_the_wanted_probability(tied):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(qwen3_config(replace(TINY_STUDENT, tied=tied)))
    end_by_chance(model, mean_tokens=50)
    with torch.no_grad():
        probabilities = model(torch.randint(3, TINY_STUDENT.vocabulary, (4, 100))).logits.softmax(-1)
    assert 0.5 < 50 * probabilities[..., EOS].mean() < 2
    assert 50 * probabilities[..., EOS].quantile(0.1) > 0.1
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    assert 0.5 < entropy < 5.6  # uniform: 6.2


def alone() -> Alone:
    stages = {name: Spent(seconds, {DRIVER_AND_RAY: 0.0}) for name, seconds in STAGE_SECONDS.items()}
    return Alone(completion_tokens=1000, stages=stages, generated_bytes=0, scored_bytes=0)


def together(seconds: float, gap: float = 0.01) -> Together:
    record = {
        "train/sampler_learner_gap": gap,
        "train/sampler_learner_gap_max": 0.3,
        "train/importance_p99": 1.02,
        "rollout/completion_length": 250.0,
        "rollout/completion_length_max": 1500.0,
    }
    return Together(2000, Spent(seconds, {DRIVER_AND_RAY: 0.0}), record)


def by_name(rows):
    return {found["name"]: found for found in rows}


def test_the_limit_on_one_card_is_the_sum_of_the_stages_per_token():
    # Alone 5 s per 1,000 tokens; together 8 s per 2,000 tokens.
    found = by_name(streaming_rows([alone()], [together(8.0)], "tiny"))
    ratio = found["loop: strict streaming / sum of the stages alone"]
    assert ratio["value"] == pytest.approx(250 / 200)
    assert ratio["met"]
    assert found["loop: strict streaming / slowest stage alone"]["value"] == pytest.approx(250 / 500)
    missed = by_name(streaming_rows([alone()], [together(12.0)], "tiny"))
    assert not missed["loop: strict streaming / sum of the stages alone"]["met"]  # 167 of 200 tokens/s


def test_stages_count_completion_tokens_and_the_sync_has_a_bar():
    found = by_name(stage_rows([alone()], "tiny"))
    assert found["alone: score"]["value"] == 1000
    assert not found["alone: sync"]["met"]  # 0.5 s


def test_the_gap_between_sampler_and_learner_has_a_bar():
    name = "sampler against learner: mean difference"
    assert by_name(sampler_rows([together(1.0, gap=0.029)], "tiny"))[name]["met"]
    assert not by_name(sampler_rows([together(1.0, gap=0.031)], "tiny"))[name]["met"]


def test_logits_that_are_rounded_and_nothing_else_stay_within_the_bar():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(32, VOCABULARY, generator=random) * LOGIT_DEVIATION
    exact, rounded = logits.log_softmax(-1), logits.bfloat16().float().log_softmax(-1)
    written = torch.multinomial(exact.exp(), 8, generator=random)
    difference = (exact - rounded).gather(1, written).abs().mean().item()
    assert 0.018 < difference < 0.022
    assert difference < 0.75 * MAX_GAP_NATS


def test_the_parts_of_a_card_take_eight_minutes_at_most():
    assert ALL_SECONDS <= 8 * 60
    assert sum(part.seconds for part in PARTS.values()) <= ALL_SECONDS
    assert share_of_time(list(PARTS), 480.0) == 40  # all take what is foreseen
    assert share_of_time(["loop", "scoring"], 340.0 + 68.0) == 216  # 180 / 340 of what those before them left
    assert share_of_time(["scoring"], 250.0) == 250  # the last, or one that runs by itself, takes all that is left


def test_what_needs_torch_alone_comes_first():
    needs = [bool(part.needs) for part in PARTS.values()]
    assert needs == sorted(needs)
    assert list(PARTS)[:2] == ["kernels", "learning"]


def test_the_lengths_are_long_tailed_up_to_two_thousand_tokens():
    lengths = long_tailed_batch(card_scale()).lengths
    assert sum(lengths) <= card_scale().micro_batch_tokens
    assert max(lengths) > 2 * sorted(lengths)[len(lengths) // 2]
    assert card_scale().prompt_tokens < max(lengths) <= 2048


def test_a_part_that_takes_too_long_is_ended_and_named(tmp_path):
    output = tmp_path / "rows.json"
    kept = Kept(output, {"card": "none"})
    rows, fault = measure_part("kernels", tmp_path, is_dry_run=True, limit_seconds=0.1, kept=kept)
    assert [found["name"] for found in rows] == ["part: seconds"]
    assert json.loads(output.read_text()) == {"machine": {"card": "none"}, "rows": rows}
    assert fault == "FAILED: kernels: took more than 0.1 s; what it had measured by then is kept"


def environment_without(tmp_path: Path, *names: str) -> dict[str, str]:
    """Return an environment in which some packages cannot be imported, as where they are not installed."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({names}))\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


TORCH_ONLY = """
import importlib.util, sys
import benchmarks.gpu_first, benchmarks.gpu_parts.kernels, benchmarks.gpu_parts.learning
import tests.conftest, tests.gpu.test_row_kernels_on_gpu, tests.gpu.test_same_numbers_on_gpu
print(importlib.util.find_spec("ray"), importlib.util.find_spec("vllm"), importlib.util.find_spec("deepspeed"))
"""


@pytest.mark.slow
def test_the_first_parts_and_tests_load_where_torch_alone_is(tmp_path):
    environment = environment_without(tmp_path, "ray", "vllm", "deepspeed", "xdist")
    command = [sys.executable, "-c", TORCH_ONLY]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "None None None", done.stderr


def test_a_part_without_its_packages_is_refused_before_anything_runs(tmp_path):
    environment = environment_without(tmp_path, "ray", "vllm")
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--parts", "loop"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FAILED: loop: this Python has no ray and no vllm" in done.stdout
    assert "==" not in done.stdout  # no part began
    listed = subprocess.run([*command[:3], "--list"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "loop: about 180 s; needs torch, ray, vllm, and this Python has no ray and no vllm" in listed.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_what_to_do(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("python -m benchmarks.gpu: nvidia-smi shows no GPU here")
    assert done.stderr.endswith("--dry-run runs on a CPU\n")


def test_every_test_on_a_gpu_says_what_it_takes():
    assert {path.name for path in (ROOT / "tests/gpu").glob("test_*.py")} == set(NEEDS)
    assert sum(needs.seconds for needs in NEEDS.values()) <= 8.5 * 60


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_a_run_that_is_ended_leaves_the_rows_that_it_had(tmp_path: Path):
    output = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--parts", "kernels", "--output", str(output)]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)

    def rows() -> list[str]:
        return [found["name"] for found in json.loads(output.read_text())["rows"]] if output.exists() else []

    try:
        while not rows():
            assert running.poll() is None
            time.sleep(0.1)
        running.terminate()
        assert running.wait(60) != 0
    finally:
        running.kill()
    assert rows()[:2] == ["card: copy, read and written", "card: matmul"]
    assert "peak memory, four stop ids as one" not in rows()  # the last of the part


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_a_bare_checkout_runs_what_torch_alone_can_and_an_engine_that_takes_weights(tmp_path: Path):
    output = tmp_path / "rows.json"
    assert bare_checkout.main(["--packages", "torch only", "--output", str(output)]) == 0
    assert bare_checkout.main(["--only", "benchmarks.gpu, sync", "--output", str(output)]) == 0
    named = {(found["size"], found["name"]) for found in json.loads(output.read_text())["rows"]}
    torch_only = {key for key in bare_checkout.COMMANDS if key[0] == "torch only"}
    assert named == torch_only | {("all packages", "benchmarks.gpu, sync")}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_the_whole_script_runs_on_a_cpu(tmp_path: Path):
    output = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=860, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads(output.read_text())["rows"]
    values = {(found["part"], found["name"]): found["value"] for found in rows}
    assert {part for part, _ in values} == set(PARTS)
    assert not any("bar" in found for found in rows)
    for name in ("sequential", "strict streaming", "staleness 1"):
        assert values["loop", f"loop: {name}"] > 0
    assert values["loop", "completion length, mean"] < 0.8 * dry_scale().max_tokens  # most end before the longest
    assert values["loop", "sampler against learner: mean difference"] < 1e-4  # float32
    assert values["scoring", "score: topk 64 / dicts"] > 0
    assert values["sync", "sync, object store, full"] > 0
    assert values["kernels", "exact reverse KL, per product"] > 0
    differences = [value for (_, name), value in values.items() if name.startswith("losses: CPU against card")]
    assert max(differences) < 1e-4
