"""A recorded run of the embedded pair, and replays: by the learner alone, by a teacher again, and beside live rows."""

from pathlib import Path

import pyarrow.dataset as ds
import pytest

from tests.end_to_end.conftest import records_of
from tests.end_to_end.runs import preceptor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("preloaded")]

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "cluster/embedded"
STEPS, ROWS = 3, 32
SETTINGS = (
    f"student.model={EMBEDDED / 'student'}",
    f"teachers.countdown.model={EMBEDDED / 'teacher'}",
    f"prompts.train={EMBEDDED / 'train.jsonl'}",
    f"prompts.prompts_per_step={ROWS}",
    "learner.learning_rate=2e-3",
    "learner.lr_schedule=constant",
    "logging.tensorboard=false",
    "ray.dashboard=false",
    # The whole step is there before the first gradient, so that micro-batches are cut alike whatever came first.
    "objective.token_weights.teacher_shares=equal",
)


def train(folder: Path, name: str, steps: int, *overrides: str) -> str:
    """Run the example's file with other settings, and return what it printed."""
    run_file = str(ROOT / "examples/replay/record.toml")
    places = (f"run.directory={folder}", f"run.name={name}", f"run.steps={steps}")
    done = preceptor("train", run_file, *SETTINGS, *places, *overrides)
    assert done.code == 0, done
    return done.output


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "recorded", STEPS)
    return folder / "recorded"


def test_a_replay_has_the_rows_the_order_and_the_losses_of_the_recorded_run(recorded: Path) -> None:
    replayed = recorded.with_name("replayed")
    said = train(replayed.parent, "replayed", STEPS - 1, "rollout.record=false", f"rollout.replay={recorded}")
    assert "rollout: 0 x" in said
    assert "teacher-countdown: 0 x" in said
    assert (resumed := preceptor("train", "--resume", str(replayed), f"run.steps={STEPS}")).code == 0, resumed
    of_both = [records_of(run) for run in (recorded, replayed)]
    names = ("train/loss", "train/gradient_norm", "train/kl", "train/importance_max", "tokens", "rollout/reward")
    assert [[record[name] for name in names] for record in of_both[0]] == [
        [record[name] for name in names] for record in of_both[1]
    ]
    assert len({record["train/loss"] for record in of_both[0]}) == STEPS
    assert all(record["replay/rows"] == ROWS and "staleness/max" not in record for record in of_both[1])
    proof = preceptor("verify", str(replayed)).output
    assert proof.startswith("3 steps, 96 trajectories: each was learned from exactly once, in order; 96 of them were")
    assert ds.dataset(recorded / "rows", format="arrow").count_rows() == ROWS * STEPS


def test_a_teacher_that_scores_again_says_what_it_has_said(recorded: Path) -> None:
    settings = ("rollout.record=false", f"rollout.replay.run={recorded}", "rollout.replay.signals=recomputed")
    said = train(recorded.parent, "recomputed", 1, *settings)
    assert "rollout: 0 x" in said
    assert "teacher-countdown: 1 x" in said
    first, again = (records_of(run)[0] for run in (recorded, recorded.with_name("recomputed")))
    assert again["train/loss"] == pytest.approx(first["train/loss"], abs=1e-4)
    assert again["train/gradient_norm"] == pytest.approx(first["train/gradient_norm"], rel=1e-3)
    assert again["teacher/scored_tokens"] == first["completion_tokens"]


@pytest.mark.exhaustive
def test_rows_are_replayed_beside_live_ones(recorded: Path) -> None:
    mixed = recorded.with_name("mixed")
    train(mixed.parent, "mixed", 2, f"rollout.replay.run={recorded}", "rollout.replay.share=0.25")
    for record in records_of(mixed):
        assert record["replay/rows"] == ROWS / 4
        assert record["staleness/max"] == 0  # of the live rows
    rows = ds.dataset(mixed / "rows", format="arrow").to_table(columns=["step", "trajectory_id"]).to_pylist()
    assert sorted(row["trajectory_id"] for row in rows) == list(range(2 * ROWS))
    assert "16 of them were recorded by" in preceptor("verify", str(mixed)).output
