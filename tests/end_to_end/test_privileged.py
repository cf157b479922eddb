"""A run whose student samples with hints what it never solves without: real engines, ledger, checkpoint, resumption."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pytest

from cluster.config.context import GentlenessConfig
from cluster.demo import EMBEDDED
from cluster.monitoring.metric_table import all_metrics
from examples.hints import make_prompts
from tests.end_to_end.conftest import records_of
from tests.end_to_end.runs import preceptor

RUN_FILE = Path(make_prompts.__file__).parent / "one_try.toml"
STEPS, PROMPTS, SAMPLES = 4, 12, 8


@pytest.fixture(scope="module")
def hinted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for some steps on prompts that every step asks for, with a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("hints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_prompts, "SIZES", {"train": PROMPTS, "held_out": 8})
        make_prompts.write_prompts(folder)
    finished = preceptor("train", str(RUN_FILE), *overrides(folder))
    assert finished.code == 0, finished.output + finished.error
    return folder / "run"


def overrides(folder: Path) -> list[str]:
    return [
        f"run.directory={folder}",
        "run.name=run",
        f"run.steps={STEPS}",
        f"student.model={EMBEDDED / 'student'}",
        f"prompts.train={folder / 'train.jsonl'}",
        f"prompts.held_out={folder / 'held_out.jsonl'}",
        f"prompts.prompts_per_step={PROMPTS}",
        "learner.zero_stage=0",
        "learner.warmup_steps=1",
        "checkpoint.every_steps=2",
        "checkpoint.keep_last=9",
        "ray.dashboard=false",
    ]


def ledger_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def test_hard_prompts_get_rows_of_the_sampler_which_the_learner_sees_as_the_engine_did(hinted_run: Path) -> None:
    first, *later = records_of(hinted_run)
    assert first["privileged/hard_prompts"] > 0
    shown = {metric.source for metric in all_metrics() if metric.source.startswith("privileged/")}
    assert shown <= {name for record in later for name in record}
    assert "privileged/prompts" not in first  # nothing was known of any prompt
    asked = [record for record in later if record.get("privileged/acceptance")]
    assert asked
    for record in asked:
        # Teacher-forced in vLLM without the hint, and by the learner, with the same weights.
        assert record["train/privileged_logprob"] == pytest.approx(record["privileged/chosen_logprob"], abs=1e-3)
        assert record["train/sampler_learner_gap_max"] < 1e-4  # of the student's own rows alone
        assert 0 < record["privileged/gentleness"] <= 1
    samples = json.loads((hinted_run / "config.json").read_text())["rollout"]["privileged"]["samples_per_prompt"]
    longest = 6 * samples * max(record["privileged/prompts"] for record in asked)
    assert 0 < asked[0]["privileged/tokens"] <= longest


def test_the_ledger_proves_the_samplers_rows_too(hinted_run: Path) -> None:
    beside = sum(len(record.get("privileged", ())) for record in ledger_of(hinted_run))
    assert beside > 0
    verified = preceptor("verify", str(hinted_run))
    assert verified.code == 0, verified.error
    own = STEPS * PROMPTS * SAMPLES
    assert (
        f"{own} trajectories, and {beside} of the privileged sampler: each was learned from exactly" in verified.output
    )


@pytest.mark.exhaustive
def test_a_resumed_run_asks_the_sampler_for_the_same_prompts(hinted_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(hinted_run, copy)
    for folder in sorted((copy / "checkpoints").iterdir())[1:]:  # all but that of step 2
        shutil.rmtree(folder)
    resumed = preceptor("train", "--resume", str(copy))
    assert resumed.code == 0, resumed.output + resumed.error
    assert ledger_of(copy) == ledger_of(hinted_run)


WRITER = """[teachers.main]
model = "TEACHER"
backend = "vllm-generate"
engine = { dtype = "float32", kv_cache_gib = 0.25 }
"""


def test_a_teacher_writes_blind_for_hard_prompts_and_scores_with_the_same_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_prompts, "SIZES", {"train": 4, "held_out": 4})
    make_prompts.write_prompts(tmp_path)
    text = RUN_FILE.read_text().replace('[teachers.self]\nfrom = "student"\n', WRITER)
    run_file = tmp_path / "run.toml"
    run_file.write_text(text.replace("TEACHER", str(EMBEDDED / "teacher")))
    changed = (
        "run.steps=2",
        "prompts.prompts_per_step=4",
        "rollout.samples_per_prompt=2",
        "rollout.record=true",
        "rollout.privileged.sampler=main",
        "rollout.privileged.template={{ prompt }}",
        "rollout.privileged.hard_after=2",
        "rollout.privileged.samples_per_prompt=16",
        "evaluation.every_steps=0",
        "checkpoint.every_steps=0",
    )
    finished = preceptor("train", str(run_file), *overrides(tmp_path), *changed)
    assert finished.code == 0, finished.output + finished.error
    asked = [record for record in records_of(tmp_path / "run") if record.get("privileged/acceptance")]
    for record in asked:
        assert record["train/privileged_logprob"] == pytest.approx(record["privileged/chosen_logprob"], abs=1e-3)
    rows = pyarrow.dataset.dataset(tmp_path / "run" / "rows", format="arrow").to_table().to_pylist()
    written = [row for row in rows if row["sampler"] == "privileged:main" and row["rollout_logprobs"]]
    assert written
    for row in written:
        # Sampled and teacher-forced by the same weights, from the same prompt.
        assert row["rollout_logprobs"] == pytest.approx(row["teacher_logprobs"], abs=1e-4)
        assert (row["reward"], row["max_policy_version"]) == (1.0, row["step"] - 1)
    assert preceptor("verify", str(tmp_path / "run")).code == 0


@pytest.mark.exhaustive
def test_a_sampler_learns_by_rewards_that_a_teacher_without_its_hint_multiplies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_prompts, "SIZES", {"train": 8, "held_out": 4})
    make_prompts.write_prompts(tmp_path)
    for name in ("train", "held_out"):
        path = tmp_path / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        hinted = [
            {**row, "plain": row["prompt"], "prompt": f"{row['prompt'].split(':')[0]}: {row['hint']} |"} for row in rows
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in hinted))
    changed = (
        "run.steps=2",
        "prompts.prompts_per_step=8",
        "rollout.record=true",
        "teachers.blind={from='student',context={template='{{ plain }}'},gentleness={}}",
        "teachers.blind.engine={dtype='float32',kv_cache_gib=0.25}",
        "objective={support='topk',support_size=1,terms={reward={loss='task_reward'}}}",
        "evaluation.every_steps=0",
        "checkpoint.every_steps=0",
    )
    text = RUN_FILE.read_text()
    run_file = tmp_path / "run.toml"
    run_file.write_text(text[: text.index("[rollout.privileged]")] + text[text.index("[learner]") :])
    finished = preceptor("train", str(run_file), *overrides(tmp_path), *changed)
    assert finished.code == 0, finished.output + finished.error
    rows = pyarrow.dataset.dataset(tmp_path / "run" / "rows", format="arrow").to_table().to_pylist()
    right = [row for row in rows if row["reward"]]
    assert right
    gentleness = GentlenessConfig()
    for row in right:
        best = np.array(row["teacher_candidate_logprobs"])[:, 0]
        expected = gentleness.of(np.array(row["teacher_logprobs"]), best)
        assert row["reward"] == pytest.approx(expected, rel=1e-5)
    first, *_ = records_of(tmp_path / "run")
    # What the environment says stays: right texts had 1.
    assert first["rollout/reward"] == pytest.approx(sum(row["step"] == 1 for row in right) / 64)
    assert 0 < first["teacher/gentleness"] < 1
