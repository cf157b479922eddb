"""A recorded run of the embedded pair, and its replay by the learner alone, interrupted and resumed."""

from pathlib import Path

import pyarrow.dataset as ds
import pytest

from tests.end_to_end.conftest import records_of
from tests.end_to_end.runs import preceptor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "cluster/embedded"
STEPS = 3
# The whole step is there before the first gradient, so that micro-batches are cut alike whatever came first.
FIXED_ORDER = "objective.token_weights.teacher_shares=equal"
SETTINGS = (
    f"student.model={EMBEDDED / 'student'}",
    f"teachers.countdown.model={EMBEDDED / 'teacher'}",
    f"prompts.train={EMBEDDED / 'train.jsonl'}",
    "prompts.prompts_per_step=32",
    "learner.learning_rate=2e-3",
    "logging.tensorboard=false",
    "ray.dashboard=false",
    FIXED_ORDER,
)


def test_a_replay_has_the_rows_the_order_and_the_losses_of_the_recorded_run(tmp_path: Path) -> None:
    recorded, replayed = tmp_path / "recorded", tmp_path / "replayed"
    settings = (*SETTINGS, f"run.directory={tmp_path}", "learner.lr_schedule=constant")
    run_file = str(ROOT / "examples/replay/record.toml")
    assert (first := preceptor("train", run_file, *settings, f"run.steps={STEPS}")).code == 0, first
    replay = ("rollout.record=false", f"rollout.replay={recorded}", "run.name=replayed", f"run.steps={STEPS - 1}")
    assert (second := preceptor("train", run_file, *settings, *replay)).code == 0, second
    assert "rollout: 0 x" in second.output
    assert "teacher-countdown: 0 x" in second.output
    assert (third := preceptor("train", "--resume", str(replayed), f"run.steps={STEPS}")).code == 0, third
    of_both = [records_of(run) for run in (recorded, replayed)]
    names = ("train/loss", "train/gradient_norm", "train/kl", "train/importance_max", "tokens", "rollout/reward")
    assert [[record[name] for name in names] for record in of_both[0]] == [
        [record[name] for name in names] for record in of_both[1]
    ]
    assert len({record["train/loss"] for record in of_both[0]}) == STEPS
    assert all(record["replay/rows"] == 32 and "staleness/max" not in record for record in of_both[1])
    proof = preceptor("verify", str(replayed)).output
    assert proof.startswith(
        f"{STEPS} steps, {32 * STEPS} trajectories: each was learned from exactly once, in order; 96 of"
    )
    assert ds.dataset(recorded / "rows", format="arrow").count_rows() == 32 * STEPS
