"""The examples of `examples/extend` in one real run: environment, teacher, signal, divergence and step hook."""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from cluster.cli import main
from cluster.config.run_directory import RunDirectory
from cluster.demo import EMBEDDED
from cluster.models.model_files import load_tokenizer
from examples.extend.teacher_backend import write_table
from tests.end_to_end.conftest import records_of
from tests.end_to_end.runs import preceptor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("preloaded")]

STEPS = 2
NUM_PROMPTS = 32
SETTINGS = (
    f"run.steps={STEPS}",
    'run.hooks=["examples.extend.step_hook:StepNotes"]',
    "environment.kind=examples.extend.two_turn_environment:SecondTry",
    "environment.max_observation_tokens=2",
    "environment.verifier=exact",
    # Without weight: the environment gives a second try where the reward is 0.
    'environment.rewards={regex=1.0, "examples.extend.reward:brevity"=0.0}',
    "teachers.countdown.backend=examples.extend.signal:BigramsWithMargin",
    'teachers.countdown.signals=["examples.extend.signal:MARGIN"]',
    "objective.terms.main.loss=divergence",
    "objective.terms.main.divergence=examples.extend.divergence:ALPHA",
    "objective.terms.main.parameter=0.5",
    f"prompts.prompts_per_step={NUM_PROMPTS}",
    "learner.warmup_steps=1",
    "evaluation.num_prompts=16",
    "checkpoint.export=false",
    "ray.dashboard=false",
)


@dataclass(frozen=True)
class ExtendedRun:
    """A run that came to its end."""

    directory: RunDirectory
    output: str

    def records(self) -> list[dict[str, Any]]:
        """Return the metrics of every step."""
        return records_of(self.directory.path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ExtendedRun:
    """Train the embedded student from a table of the pairs of tokens in the demo's prompts."""
    folder = tmp_path_factory.mktemp("extend")
    tokenizer = load_tokenizer(str(EMBEDDED / "student"), trust_remote_code=False)
    prompts = [json.loads(line)["prompt"] for line in (EMBEDDED / "train.jsonl").read_text().splitlines()]
    write_table(folder / "pairs.json", 112, [tokenizer(prompt)["input_ids"] for prompt in prompts])
    settings = (*SETTINGS, f"teachers.countdown.model={folder / 'pairs.json'}")
    found = preceptor("demo", f"run.directory={folder}", "run.name=run", *settings)
    assert found.code == 0, found.error
    return ExtendedRun(RunDirectory(folder / "run"), found.output)


def test_the_student_learns_by_the_divergence(run: ExtendedRun) -> None:
    records = run.records()
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["train/loss"] > 0 and record["train/gradient_norm"] > 0 for record in records)
    assert all(np.isfinite(record["train/loss"]) for record in records)


def test_the_table_scores_and_the_student_learns_from_the_sampled_tokens_of_both_answers(run: ExtendedRun) -> None:
    for record in run.records():
        assert record["teacher/scored_tokens"] == record["rollout/tokens"] == record["completion_tokens"]
        # The learner computes what the engine did, across the hint too.
        assert record["train/sampler_learner_gap_max"] < 1e-4
        # Every prompt has 10 tokens, and every hint 2; most first answers of the untrained student are wrong.
        hint_tokens = record["tokens"] - record["completion_tokens"] - NUM_PROMPTS * 10
        assert 2 * NUM_PROMPTS / 4 < hint_tokens <= 2 * NUM_PROMPTS
        assert hint_tokens % 2 == 0
    samples = [json.loads(line) for line in run.directory.samples.read_text().splitlines()]
    # After its result the student ends an answer or marks a miss; anything else there begins a second answer.
    assert any(re.search(r"= \d+ [^x]", sample["completion"]) for sample in samples)


def test_the_function_that_rewards_ran_in_time_for_every_trajectory(run: ExtendedRun) -> None:
    assert [record["rollout/reward_timeouts"] for record in run.records()] == [0.0] * STEPS
    assert all(0 < record["rollout/reward"] < 1 for record in run.records())
    assert "held-out reward: student" in run.output


def test_the_ledger_of_a_run_with_two_answers_is_right(run: ExtendedRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run.directory.path)]) == 0
    found = capsys.readouterr().out
    assert found == f"{STEPS} steps, {STEPS * NUM_PROMPTS} trajectories: each was learned from exactly once, in order\n"


def test_the_hook_writes_a_line_per_step_and_adds_a_metric(run: ExtendedRun) -> None:
    notes = run.directory.path / "steps.txt"
    assert [line.split(": KL ")[0] for line in notes.read_text().splitlines()] == ["step 1", "step 2"]
    # The demo's longest completion; two answers share it.
    assert all(0 < record["notes/longest_completion"] <= 48 for record in run.records())
    assert f"notes: {notes}" in run.output
