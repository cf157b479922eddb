"""A real run whose student writes byte-level BPE tokens, and whose teacher reads tokens as SentencePiece makes them."""

import json
from pathlib import Path

import pytest

from cluster.demo import EMBEDDED
from examples.countdown.other_tokenizers import write_untrained
from tests.end_to_end.conftest import records_of
from tests.end_to_end.runs import running

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(600)]

STEPS = 3


def test_a_student_learns_from_a_teacher_with_another_tokenizer(tmp_path: Path) -> None:
    write_untrained(tmp_path / "models", EMBEDDED)
    overrides = (
        f"student.model={tmp_path / 'models/student'}",
        f"teachers.countdown.model={tmp_path / 'models/teacher'}",
        "teachers.countdown.tokenizer=aligned",
        "objective.preset=cross-tokenizer",
        f"run.steps={STEPS}",
        "prompts.prompts_per_step=32",
        "learner.num_workers=1",
        "learner.zero_stage=0",
        "evaluation.num_prompts=16",
        "evaluation.every_steps=0",
        "score_audit.every_steps=2",
        "checkpoint.export=false",
        "ray.dashboard=false",
    )
    with running(tmp_path / "runs", *overrides) as run:
        run.process.wait()
    output = "".join(run.lines)
    assert run.process.returncode == 0, output
    [line] = [line for line in run.lines if "aligned with the student's tokens" in line]
    records = [record for record in records_of(run.directory) if "train/loss" in record]
    assert len(records) == STEPS
    for record in records:
        # Every number and sign is one token of both; what the student seldom writes otherwise is not.
        assert record["teacher/coverage"] > 0.95
        assert record["teacher/dropped_rows"] == 0
        assert record["teacher/teacher_shared_mass"] > 0.95
        assert record["train/loss"] > 0
    digest = line.rpartition("(map ")[2].rstrip(")\n ")
    for step in (run.directory / "ledger.jsonl").read_text().splitlines():
        assert json.loads(step)["teachers"]["countdown"].endswith(f"+{digest}")
    assert records[-1]["held_out/kl"] < 2
