"""The loop on the embedded models: real Ray, vLLM, DeepSpeed and Arrow, from the command line."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.demo import EMBEDDED
from tests.end_to_end.conftest import SHORT, STEPS, ShortRun
from tests.end_to_end.runs import preceptor

EMBEDDED_PATHS = (
    f"student.model={EMBEDDED / 'student'}",
    f"teachers.countdown.model={EMBEDDED / 'teacher'}",
    f"prompts.train={EMBEDDED / 'train.jsonl'}",
    f"prompts.held_out={EMBEDDED / 'held_out.jsonl'}",
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("preloaded")]


def test_every_step_is_recorded_with_every_stage(short_run: ShortRun) -> None:
    records = short_run.records()
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        for stage in ("generate", "score", "learn", "sync"):
            assert record[f"{stage}/seconds"] > 0
        # The rollout engine runs on the weights of the sync before; the learner computes with its own.
        assert record["train/sampler_learner_gap_max"] < 1e-4
        assert record["teacher/scored_tokens"] == record["rollout/tokens"] == record["completion_tokens"]


def test_the_student_comes_closer_to_the_teacher(short_run: ShortRun) -> None:
    line = next(line for line in short_run.output.splitlines() if line.startswith("KL to the teacher per token"))
    before, after = (float(value) for value in line.split(": ")[1].split(" -> "))
    assert after < before
    assert after == pytest.approx(short_run.records()[-1]["held_out/kl"], abs=5e-5)


def test_the_last_line_says_what_was_achieved(short_run: ShortRun) -> None:
    last = short_run.output.splitlines()[-1]
    assert re.fullmatch(r"held-out accuracy: student 0\.\d\d -> 0\.\d\d, teacher [01]\.\d\d", last)
    assert float(last.split()[5].rstrip(",")) == pytest.approx(short_run.records()[-1]["held_out/accuracy"], abs=0.005)


def test_the_export_is_the_last_policy_and_loads_anywhere(short_run: ShortRun) -> None:
    exported = AutoModelForCausalLM.from_pretrained(short_run.path / "export")
    before = AutoModelForCausalLM.from_pretrained(EMBEDDED / "student")
    tokenizer = AutoTokenizer.from_pretrained(short_run.path / "export")
    changed = [
        not torch.equal(new, old.to(new.dtype))
        for new, old in zip(exported.parameters(), before.parameters(), strict=True)
    ]
    assert all(changed)
    assert "| accuracy, held-out prompts |" in ModelCard.load(short_run.path / "export" / "README.md").text
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(EMBEDDED / "student").get_vocab()


def test_vllm_serves_the_export_as_it_served_the_last_policy(short_run: ShortRun) -> None:
    found = preceptor(
        "eval",
        str(EMBEDDED / "demo.toml"),
        *EMBEDDED_PATHS,
        f"student.model={short_run.path / 'export'}",
        "evaluation.teacher_too=false",
        *SHORT,
    )
    assert found.code == 0, found.error
    accuracy = float(re.search(r"held-out, student: accuracy (\S+),", found.output)[1])
    # The same seeds on the same weights; one sample may tip over by rounding, since the batches differ.
    assert accuracy == pytest.approx(short_run.records()[-1]["held_out/accuracy"], abs=0.02)


def test_only_complete_checkpoints_stand_in_the_run(short_run: ShortRun) -> None:
    assert sorted(path.name for path in (short_run.path / "checkpoints").iterdir()) == ["step-3", "step-6"]


def test_damage_to_the_only_checkpoint_is_one_sentence(short_run: ShortRun, tmp_path: Path) -> None:
    shutil.copytree(short_run.path, tmp_path / "short")
    shutil.rmtree(tmp_path / "short/checkpoints/step-3")
    (tmp_path / "short/checkpoints/step-6/rank-1.safetensors").write_bytes(b"\x80\x04.")
    found = preceptor("train", "--resume", str(tmp_path / "short"), "run.steps=8")
    assert found.code == 1
    assert re.fullmatch(
        r"preceptor: checkpoint \S+step-6: rank-1.safetensors has 3 bytes where manifest.json says \d+\n", found.error
    )


def test_a_finished_run_has_nothing_to_resume(short_run: ShortRun) -> None:
    found = preceptor("train", "--resume", str(short_run.path))
    assert found.code == 1
    assert "step 6 of 6 is done; to go on, resume with run.steps above 6" in found.error


# One term of each kind whose gradient is 0 where teacher and student are the same.
CHECKED_TERMS = {
    "tail": "{loss = 'divergence', divergence = 'reverse_kl'}",
    "generalized": "{loss = 'divergence', divergence = 'forward_kl', truncation = 'generalized'}",
    "renormalized": "{loss = 'divergence', divergence = 'jsd', truncation = 'renormalized'}",
    "sampled": "{loss = 'policy_gradient'}",
}


def test_the_embedded_pair_passes_every_self_check() -> None:
    terms = ", ".join(f"{name} = {term}" for name, term in CHECKED_TERMS.items())
    found = preceptor(
        "check",
        str(EMBEDDED / "demo.toml"),
        *EMBEDDED_PATHS,
        "teachers.countdown.num_workers=2",
        # The check builds and sends contexts that say no more than the prompt: the student as its own teacher reads it.
        "teachers.countdown.context.template={{ answer }} {{ prompt }}",
        f"objective={{support = 'topk', support_size = 16, terms = {{{terms}}}}}",
        *SHORT,
        "learner.num_workers=1",
    )
    assert found.code == 0, found.output + found.error
    assert "FAIL" not in found.output
    assert "between 2 replica(s)" in found.output
    gradients = re.findall(r"term '(\w+)' at student = teacher: gradient norm ([\d.e+-]+)", found.output)
    assert [name for name, _ in gradients] == list(CHECKED_TERMS)
    assert all(float(norm) < 1e-5 for _, norm in gradients)
