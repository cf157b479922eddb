"""Which recorded rows a step learns from, and as what batches."""

from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from cluster.config.run_directory import RunDirectory
from cluster.contracts.batches import BatchHandle, ReadyBatches
from cluster.contracts.errors import CheckpointError, ConfigError, PromptError, TrainingError
from cluster.contracts.recorded_rows import RecordedBatch, RecordedRows
from cluster.contracts.trajectory import GeneratedTrajectory, add_scores, make_generated, row_id
from cluster.contracts.wire import from_wire
from cluster.run.inputs import step_requests
from cluster.run.ledger import Ledger, audit, read_ledger
from cluster.run.recording import Recording
from cluster.run.replay import Replay, live, without_idle_workers
from cluster.run.step_metrics import _staleness
from rollout_workers.prompts import PromptOrder
from tests.builders import make_scores, make_trajectory
from tests.cluster.run.contexts import make_run_context
from tests.cluster.run.recorded import (
    ARRIVALS,
    PER_STEP,
    Store,
    config_of,
    record_step,
    record_steps,
    replaying,
    scored,
)

IN_ROLLOUT_ENGINES = (
    "teachers.main.from=student",
    "teachers.main.model=student",
    "teachers.main.backend=rollout",
    "teachers.main.refresh=live",
    "teachers.main.num_workers=0",
)
ORDER = PromptOrder(num_prompts=50, seed=0, shuffle=True)


def make_replay(folder: Path, *overrides: str) -> tuple[Replay, Store]:
    store = Store()
    return Replay(replaying(folder, *overrides), store), store  # type: ignore[arg-type]


def batches_of(replay: Replay, store: Store, step: int) -> list[pa.RecordBatch]:
    return [from_wire(store.values[handle.reference]) for handle in replay.read(step)]


def test_recorded_batches_come_back_bit_by_bit_in_their_order(tmp_path: Path) -> None:
    directory = record_steps(tmp_path, steps=1)
    recorded = record_step(directory, step=2)
    replay, store = make_replay(tmp_path)
    found = batches_of(replay, store, 1)
    assert len(found) == len(ARRIVALS)
    assert all(one.equals(other, check_metadata=True) for one, other in zip(found, recorded, strict=True))
    handle = replay.read(1)[0]
    assert (handle.trajectory_ids, handle.is_replayed, handle.scored_by) == ((10, 7), True, {"main": "checkpoint"})
    assert replay.versions(1) == (1, 1)


def test_a_second_pass_has_the_same_rows_under_new_ids(tmp_path: Path) -> None:
    record_steps(tmp_path)
    replay, store = make_replay(tmp_path)
    first, third = batches_of(replay, store, 0), batches_of(replay, store, 2)
    assert [batch["trajectory_id"].to_pylist() for batch in third] == [
        [2 * PER_STEP + place for place in places] for places in ARRIVALS
    ]
    assert [batch["token_ids"] for batch in third] == [batch["token_ids"] for batch in first]
    assert (replay.epoch(1), replay.epoch(2)) == (0, 1)
    assert [one.seed for one in replay.requests(0)] == [one.seed for one in replay.requests(2)]
    assert len({one.seed for step in (0, 1) for one in replay.requests(step)}) == 2 * PER_STEP


def test_a_filter_leaves_prompts_with_the_samples_that_pass(tmp_path: Path) -> None:
    record_steps(tmp_path)
    replay, store = make_replay(tmp_path, "rollout.replay.where=reward > 0 and step == 2")
    batches = batches_of(replay, store, 0)
    assert [batch["reward"].to_pylist() for batch in batches] == [[1.0], [1.0], [1.0]]
    assert [one for batch in batches for one in batch["trajectory_id"].to_pylist()] == [1, 5, 3]
    assert [one.trajectory_id for one in replay.requests(0)] == [1, 3, 5]


def test_shuffled_passes_have_each_prompt_once_and_differ(tmp_path: Path) -> None:
    record_steps(tmp_path, steps=8)
    replay, _ = make_replay(tmp_path, "rollout.replay.shuffle=true")
    passes = [[one.prompt_id for step in steps for one in replay.requests(step)] for steps in (range(8), range(8, 16))]
    straight, _ = make_replay(tmp_path)
    in_order = [one.prompt_id for step in range(8) for one in straight.requests(step)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(in_order)
    assert passes[0] != passes[1] != in_order
    again, _ = make_replay(tmp_path, "rollout.replay.shuffle=true")
    assert [one.prompt_id for step in range(8) for one in again.requests(step)] == passes[0]


def test_a_share_of_each_step_is_replayed_and_the_rest_sampled(tmp_path: Path) -> None:
    record_steps(tmp_path)
    config = replaying(tmp_path, "rollout.replay.share=0.34")
    replay = Replay(config)
    live = [step_requests(config, ORDER, step) for step in range(3)]
    assert [[one.trajectory_id for one in requests] for requests in live[:2]] == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert [one.prompt_id for requests in live for one in requests[::2]] == ORDER.take(0, 6)
    assert [[one.trajectory_id for one in replay.requests(step)] for step in range(2)] == [[4, 5], [10, 11]]
    assert [one.prompt_id for step in range(3) for one in replay.requests(step)[:1]] == [10, 11, 12]


def test_all_rows_of_an_episode_stay_together(tmp_path: Path) -> None:
    directory = record_steps(tmp_path, steps=1)
    episode = PER_STEP + 3
    rows = [
        make_trajectory(
            trajectory_id=row_id(episode, index), episode_id=episode, prompt_id=7, sample_index=1, turn=index
        )
        for index in range(2)
    ]
    batch = add_scores(make_generated(rows), "teacher", make_scores(6, 2))
    RecordedRows(directory.rows).write(2, [RecordedBatch(batch, {"main": "checkpoint"}, {})], "p")
    replay, store = make_replay(tmp_path, "rollout.replay.where=step == 2")
    [found] = batches_of(replay, store, 0)  # the only prompt stands for all three of the step
    assert found["episode_id"].to_pylist() == [1, 3, 5] * 2
    assert found["trajectory_id"].to_pylist() == [row_id(one, turn) for turn in range(2) for one in (1, 3, 5)]
    assert [one.trajectory_id for one in replay.requests(0)] == [1, 3, 5]


def test_rows_to_score_again_have_nothing_of_a_teacher(tmp_path: Path) -> None:
    record_steps(tmp_path)
    replay, store = make_replay(tmp_path, "rollout.replay.signals=recomputed", "objective.support_size=7")
    [batch, *_] = batches_of(replay, store, 0)
    names = [name for name in scored((4, 1), 1).schema.names if not name.startswith(("teacher_", "candidate_"))]
    assert batch.schema.names == names
    assert replay.read(0)[0].scored_by == {}


@pytest.mark.parametrize(
    ("override", "error", "sentence"),
    [
        (
            "rollout.temperature=0.5",
            ConfigError,
            "rollout.temperature is 0.5, and .* was sampled with 1.0; set the same",
        ),
        ("rollout.samples_per_prompt=3", ConfigError, "rollout.samples_per_prompt is 3, and .* with 2"),
        ("rollout.replay.where=reward > 1", ConfigError, "'reward > 1' holds for no row"),
        (
            "rollout.replay.where=rewards > 1",
            ConfigError,
            "No match for FieldRef.Name.rewards.* there are trajectory_id",
        ),
        ("objective.support_size=3", ConfigError, "reads 3 candidate_ids per token, and .* 2; set .* 'recomputed'"),
        ("objective=thinking-machines", ConfigError, "reads 0 candidate_ids per token, and .* 2"),
        ("objective.token_weights.entropy=teacher", ConfigError, "have no teacher_entropy, which the objective reads"),
        ("objective=sdpo", ConfigError, "reads 100 candidate_rollout_logprobs .* 0; record a run with this support"),
        ("rollout.replay.run=elsewhere", CheckpointError, "elsewhere: holds no run"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(
    tmp_path: Path, override: str, error: type[Exception], sentence: str
) -> None:
    record_steps(tmp_path)
    with pytest.raises(error, match=sentence):
        make_replay(tmp_path, override)


def test_rows_of_other_prompts_are_refused(tmp_path: Path) -> None:
    record_steps(tmp_path, prompts="theirs")
    replay, _ = make_replay(tmp_path)
    replay.check_prompts("theirs")
    with pytest.raises(PromptError, match="step 1 was recorded with other prompts"):
        replay.check_prompts("ours")


def test_a_damaged_file_and_a_step_without_all_its_rows_are_refused(tmp_path: Path) -> None:
    directory = record_steps(tmp_path)
    path = RecordedRows(directory.rows).files()[2][0]
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"prompts":"p"', b'"prompts":"q"'))
    replay, _ = make_replay(tmp_path)
    replay.read(0)
    with pytest.raises(CheckpointError, match="its content is not what its name says"):
        replay.read(1)
    path.write_bytes(content.replace(b'"step_rows":6', b'"step_rows":7'))
    with pytest.raises(CheckpointError, match="6 of the 7 rows of step 2 are there"):
        make_replay(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="rows cannot be read"):
        make_replay(tmp_path)


def test_the_ledger_proves_which_rows_each_step_learned_from(tmp_path: Path) -> None:
    record_steps(tmp_path)
    config = replaying(tmp_path, "run.steps=3")
    replay, _ = make_replay(tmp_path)
    ledger = Ledger(tmp_path / "ledger.jsonl", first_step=0)
    for step in range(3):
        ledger.admit(step + 1, replay.requests(step))
        batches = ledger.watch(step + 1, ReadyBatches(replay.read(step)))
        while not batches.is_exhausted:
            batches.take()
        ledger.after_step(step + 1, {}, [])
    records = read_ledger(tmp_path / "ledger.jsonl")
    assert [record.policy_versions for record in records] == [(0, 0), (1, 1), (0, 0)]
    assert audit(records, config, ORDER, replay) == 9
    other = Replay(replaying(tmp_path, "rollout.replay.shuffle=true", "run.seed=1"))
    with pytest.raises(TrainingError, match="record 1"):
        audit(records, config, ORDER, other)
    with pytest.raises(TrainingError, match="is not what the run asks for"):
        audit(records, config_of(tmp_path), ORDER)


def test_a_replayed_row_that_is_missing_fails_the_step(tmp_path: Path) -> None:
    record_steps(tmp_path)
    replay, _ = make_replay(tmp_path)
    ledger = Ledger(tmp_path / "ledger.jsonl", first_step=0)
    ledger.admit(1, replay.requests(0))
    batches = ledger.watch(1, ReadyBatches(replay.read(0)[:2]))
    batches.take()
    with pytest.raises(TrainingError, match="of its trajectories, 2 to 3 never came"):
        _ = batches.is_exhausted


def test_no_age_is_said_of_replayed_rows(tmp_path: Path) -> None:
    record_steps(tmp_path)
    replay, _ = make_replay(tmp_path)
    assert _staleness(9, replay.read(0)) == {}


def test_workers_without_use_are_left_out(tmp_path: Path) -> None:
    record_steps(tmp_path)
    counts = {}
    for name, overrides in {
        "recorded": (),
        "recomputed": ("rollout.replay.signals=recomputed",),
        "half": ("rollout.replay.share=0.34",),
        "in the rollout engines": ("rollout.replay.signals=recomputed", *IN_ROLLOUT_ENGINES),
    }.items():
        for has_held_out in (False, True):
            left = without_idle_workers(replaying(tmp_path, *overrides), has_held_out)
            counts[name, has_held_out] = left.rollout.num_workers, left.teachers["main"].num_workers
    assert counts == {
        ("recorded", False): (0, 0),
        ("recorded", True): (1, 0),
        ("recomputed", False): (0, 1),
        ("recomputed", True): (1, 1),
        ("half", False): (1, 1),
        ("half", True): (1, 1),
        ("in the rollout engines", False): (1, 0),
        ("in the rollout engines", True): (1, 0),
    }


def test_checks_sample_what_a_replay_does_not(tmp_path: Path) -> None:
    record_steps(tmp_path)
    assert step_requests(replaying(tmp_path), ORDER, 0) == []
    assert step_requests(live(replaying(tmp_path)), ORDER, 0) == step_requests(config_of(tmp_path), ORDER, 0)


def handle_of(store: Store, batch: pa.RecordBatch) -> BatchHandle:
    from cluster.actors.object_store import pack

    pieces, handle = pack(batch, {})
    return BatchHandle(**{**vars(handle), "reference": store.put(pieces), "scored_by": {"main": "checkpoint"}})


def make_recording(directory: RunDirectory, store: Store, first_step: int = 0) -> Recording:
    config = directory.read_config()
    inputs = SimpleNamespace(prompts=SimpleNamespace(checksum="p"))
    run = make_run_context(config, inputs, None, directory, first_step)  # type: ignore[arg-type]
    return Recording(run, store)  # type: ignore[arg-type]


def test_a_run_records_each_step_beside_the_next(tmp_path: Path) -> None:
    directory, store = RunDirectory.create(config_of(tmp_path, "rollout.record=true", "run.steps=9")), Store()
    recording = make_recording(directory, store)
    steps = [[scored((one, one + 1), step) for one in (4, 0)] for step in (1, 2)]
    assert recording.after_step(1, {}, [handle_of(store, batch) for batch in steps[0]]) == {}
    written = recording.after_step(2, {}, [handle_of(store, batch) for batch in steps[1]])
    assert written.keys() == {"record/bytes", "record/write_seconds", "record/wait_seconds"}
    recording.end(None)
    files = RecordedRows(directory.rows).files()
    assert list(files) == [1, 2]
    assert files[1][0].stat().st_size == written["record/bytes"]
    elsewhere = ds.dataset(directory.rows, format="arrow").to_table()
    assert elsewhere["trajectory_id"].to_pylist() == [4, 5, 0, 1] * 2
    assert elsewhere["step"].to_pylist() == [1] * 4 + [2] * 4
    assert elsewhere["batch"].to_pylist() == [0, 0, 1, 1] * 2
    assert elsewhere["log_ratio"].to_pylist() == pytest.approx([1 - 0.693147] * 8, abs=1e-5)
    assert not list(directory.rows.glob("*.partial"))


def test_a_resumed_run_records_its_repeated_steps_once(tmp_path: Path) -> None:
    directory = record_steps(tmp_path, steps=3)
    make_recording(directory, Store(), first_step=1)
    assert list(RecordedRows(directory.rows).files()) == [1]


def test_a_record_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    directory, store = RunDirectory.create(config_of(tmp_path, "rollout.record=true", "run.steps=9")), Store()
    recording = make_recording(directory, store)
    directory.rows.write_text("a file in the folder's place")
    recording.after_step(1, {}, [handle_of(store, scored((0, 1), 1))])
    with pytest.raises(CheckpointError, match="the rows of step 1 cannot be recorded"):
        recording.end(None)


def test_batches_of_other_columns_have_files_of_their_own(tmp_path: Path) -> None:
    directory = RunDirectory.create(config_of(tmp_path, "rollout.record=true"))
    rows: list[GeneratedTrajectory] = [make_trajectory(trajectory_id=3)]
    other = add_scores(make_generated(rows), "teacher", make_scores(3))
    batches = [scored((0, 1), 1), other, scored((4, 5), 1)]
    RecordedRows(directory.rows).write(1, [RecordedBatch(batch, {}, {}) for batch in batches], "p")
    assert len(RecordedRows(directory.rows).files()[1]) == 2
    table = RecordedRows(directory.rows).table(["batch", "trajectory_id"], "is_null(candidate_ids)")
    assert table.to_pydict() == {"batch": [1], "trajectory_id": [3]}
