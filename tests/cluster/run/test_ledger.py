"""Every trajectory is learned from exactly once, or the step is not taken."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.config.run_config import Config
from cluster.config.run_file import parse_run_config
from cluster.contracts.batches import BatchHandle, BatchSource, ReadyBatches
from cluster.contracts.errors import CheckpointError, TrainingError
from cluster.contracts.requests import RolloutRequest
from cluster.contracts.trajectory import row_id
from cluster.run.inputs import Inputs, train_requests
from cluster.run.ledger import Ledger, LedgerRecord, audit, read_ledger
from rollout_workers.prompts import PromptOrder, PromptSet
from tests.builders import MINIMAL_RUN, make_config

PROMPTS_PER_STEP, SAMPLES = 3, 2
ORDER = PromptOrder(num_prompts=5, seed=3, shuffle=True)
INPUTS = Inputs(PromptSet.of_token_ids([[1]] * 5, "main"), ORDER, held_out_ids=(), max_model_len=8)
CONFIG = make_config(
    f"prompts.prompts_per_step={PROMPTS_PER_STEP}", f"rollout.samples_per_prompt={SAMPLES}", "rollout.max_staleness=1"
)


def requests_of(step: int) -> list[RolloutRequest]:
    """Return the requests of step `step`, from 0."""
    return train_requests(CONFIG, INPUTS, step)


def batch_of(requests: list[RolloutRequest], oldest: int = 0, newest: int = 0) -> BatchHandle:
    ids = tuple(request.trajectory_id for request in requests)
    return BatchHandle(
        None,
        "main",
        ids,
        (4,) * len(ids),
        (2,) * len(ids),
        prompt_ids=tuple(request.prompt_id for request in requests),
        min_policy_versions=(oldest,) * len(ids),
        max_policy_versions=(newest,) * len(ids),
    )


def consume(ledger: Ledger, step: int, handles: list[BatchHandle] | None = None) -> None:
    """Do as the driver and the learner do; `step` from 1."""
    ledger.admit(step, requests_of(step - 1))
    batches = ledger.watch(step, ReadyBatches([batch_of(requests_of(step - 1))] if handles is None else handles))
    take_all(batches)
    ledger.after_step(step, {}, [])


def take_all(batches: BatchSource) -> None:
    while not batches.is_exhausted:
        batches.take()


def make_ledger(path: Path, steps: int) -> Ledger:
    ledger = Ledger(path, first_step=0)
    for step in range(1, steps + 1):
        rows = requests_of(step - 1)
        consume(ledger, step, [batch_of(rows[4:], step - 1, step - 1), batch_of(rows[:4], max(0, step - 2), step - 1)])
    return ledger


def test_a_record_says_what_its_step_consumed(tmp_path: Path) -> None:
    make_ledger(tmp_path / "ledger.jsonl", 2)
    second = read_ledger(tmp_path / "ledger.jsonl")[1]
    assert second.step == 2
    assert second.trajectory_ids == ((6, 11),)  # 3 prompts of 2 samples each: step 1 had 0 to 5
    assert list(second.prompt_ids) == ORDER.take(3, 3)
    assert second.policy_versions == (0, 1)


def test_a_record_says_which_checkpoint_of_each_teacher_scored(tmp_path: Path) -> None:
    rows = requests_of(0)
    by_two = [replace(batch_of(rows[:4]), scored_by={"math": "a1", "base": "b1"}), batch_of(rows[4:])]
    consume(Ledger(tmp_path / "ledger.jsonl", first_step=0), 1, by_two)
    assert read_ledger(tmp_path / "ledger.jsonl")[0].teachers == {"math": "a1", "base": "b1"}


def test_a_step_that_two_checkpoints_of_a_teacher_scored_is_not_taken(tmp_path: Path) -> None:
    rows = requests_of(0)
    mixed = [
        replace(batch_of(rows[:4]), scored_by={"math": "a1"}),
        replace(batch_of(rows[4:]), scored_by={"math": "a2"}),
    ]
    with pytest.raises(TrainingError, match="step 1: two checkpoints of teacher math scored it, a1 and a2"):
        consume(Ledger(tmp_path / "ledger.jsonl", first_step=0), 1, mixed)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (lambda rows: [batch_of(rows[:5])], r"step 1: of its trajectories, 5 never came"),
        (lambda rows: [batch_of([rows[0], rows[4]])], r"of its trajectories, 1 to 3, 5 never came"),
        (lambda rows: [batch_of(rows), batch_of(rows[2:3])], "trajectory 2 came a second time"),
        (lambda rows: [batch_of([rows[1], rows[1]])], "trajectory 1 came a second time"),
        (lambda rows: [batch_of([*rows, replace(rows[0], trajectory_id=6)])], "trajectory 6 came, which it does not"),
        (lambda rows: [batch_of([replace(rows[0], prompt_id=99)])], r"trajectory 0 answers prompt 99 instead of \d"),
        (lambda rows: [], r"0 to 5 never came"),
    ],
)
def test_what_is_not_exactly_what_was_asked_for_ends_the_step(tmp_path: Path, given: Any, found: str) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", 0)
    ledger.admit(1, requests_of(0))
    batches = ledger.watch(1, ReadyBatches(given(requests_of(0))))
    # Before the learner knows that it has all batches, upon which it changes the weights.
    with pytest.raises(TrainingError, match=found):
        take_all(batches)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_a_learner_that_does_not_take_all_cannot_close_the_step(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", 0)
    ledger.admit(1, requests_of(0))
    with pytest.raises(TrainingError, match="0 to 5 never came"):
        ledger.after_step(1, {}, [])


def test_steps_asked_for_and_not_learned_from_are_in_flight(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path / "ledger.jsonl", 2)
    for step in (3, 4):
        ledger.admit(step, requests_of(step - 1))
    assert ledger.state().in_flight == (3, 4)


def test_a_resumed_run_forgets_later_steps_and_knows_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    state = make_ledger(path, 2).state()
    longer = make_ledger(tmp_path / "longer.jsonl", 5)
    (tmp_path / "longer.jsonl").rename(path)
    resumed = Ledger(path, first_step=2)
    resumed.check(state)
    assert [record.step for record in read_ledger(path)] == [1, 2]
    for step in (3, 4, 5):
        rows = requests_of(step - 1)
        consume(resumed, step, [batch_of(rows[4:], step - 1, step - 1), batch_of(rows[:4], step - 2, step - 1)])
    assert resumed.state().checksum == longer.state().checksum


def test_a_changed_record_is_not_the_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    state = make_ledger(path, 2).state()
    path.write_text(path.read_text().replace('"policy_versions": [0, 0]', '"policy_versions": [0, 1]'))
    with pytest.raises(CheckpointError, match="its records are not those of the run's checkpoint"):
        Ledger(path, first_step=2).check(state)


@pytest.mark.parametrize("torn", ['{"step": 3, "traj', "\0" * 40 + "\n", "{", '{"step": 3}garbage\n'])
def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "ledger.jsonl"
    state = make_ledger(path, 2).state()
    with path.open("a") as file:
        file.write(torn)
    assert len(read_ledger(path)) == 2
    resumed = Ledger(path, first_step=2)
    resumed.check(state)
    consume(resumed, 3)
    assert [record.step for record in read_ledger(path)] == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    make_ledger(path, 3)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], lines[2]]) + "\n")
    with pytest.raises(CheckpointError, match=r"ledger.jsonl:2: not a record of a step"):
        Ledger(path, first_step=3)


def test_an_undisturbed_run_passes_the_audit(tmp_path: Path) -> None:
    make_ledger(tmp_path / "ledger.jsonl", 7)
    records = read_ledger(tmp_path / "ledger.jsonl")
    assert audit(records, CONFIG, ORDER) == 21
    asked = [prompt for record in records for prompt in record.prompt_ids]
    # Four whole epochs of five prompts, each of them once per epoch, and one position of the fifth.
    assert [sorted(asked[epoch * 5 : epoch * 5 + 5]) for epoch in range(4)] == [[0, 1, 2, 3, 4]] * 4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("step", {"step": 2}),
        ("trajectory_ids", {"trajectory_ids": ((12, 16),)}),
        ("trajectory_ids", {"trajectory_ids": ((12, 14), (16, 17))}),
        ("prompt_ids", {"prompt_ids": (0, 0, 0)}),
        ("seeds_checksum", {"seeds_checksum": "0"}),
        ("policy_versions", {"policy_versions": (0, 2)}),  # staler than 1
        ("policy_versions", {"policy_versions": (2, 3)}),  # by weights that there were not yet
        ("policy_versions", {"policy_versions": (2, 1)}),
    ],
)
def test_a_record_that_differs_fails_the_audit(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    make_ledger(tmp_path / "ledger.jsonl", 4)
    records = read_ledger(tmp_path / "ledger.jsonl")
    fields = {field: getattr(records[2], field) for field in LedgerRecord.__struct_fields__}
    records[2] = LedgerRecord(**{**fields, **change})
    with pytest.raises(TrainingError, match=f"ledger record 3: {name} is not what the run asks for"):
        audit(records, CONFIG, ORDER)


@pytest.mark.parametrize("lost", [0, 2])
def test_a_lost_and_a_repeated_step_fail_the_audit(tmp_path: Path, lost: int) -> None:
    make_ledger(tmp_path / "ledger.jsonl", 4)
    records = read_ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(TrainingError, match=f"ledger record {lost + 1}: step"):
        audit(records[:lost] + records[lost + 1 :], CONFIG, ORDER)
    with pytest.raises(TrainingError, match=f"ledger record {lost + 2}: step"):
        audit(records[: lost + 1] + records[lost:], CONFIG, ORDER)


def test_the_records_are_plain_json(tmp_path: Path) -> None:
    make_ledger(tmp_path / "ledger.jsonl", 1)
    [record] = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert record["trajectory_ids"] == [[0, 5]]


def selves(*overrides: str) -> Config:
    text = MINIMAL_RUN.replace('model = "teacher"', 'from = "student"')
    common = [f"prompts.prompts_per_step={PROMPTS_PER_STEP}", f"rollout.samples_per_prompt={SAMPLES}"]
    return parse_run_config(text, [*common, *overrides])


def record_of(step: int, versions: dict[str, tuple[int, int]]) -> LedgerRecord:
    record = LedgerRecord.of(step, train_requests(CONFIG, INPUTS, step - 1), (step - 1, step - 1))
    return msgspec.structs.replace(record, teachers={"main": "a1"}, teacher_versions=versions)


def test_a_record_says_which_versions_of_the_student_itself_scored(tmp_path: Path) -> None:
    rows = requests_of(0)
    parts = ((rows[:4], 3), (rows[4:], 1))
    scored = [replace(batch_of(part), teacher_versions={"main": version}) for part, version in parts]
    consume(Ledger(tmp_path / "ledger.jsonl", first_step=0), 1, scored)
    assert read_ledger(tmp_path / "ledger.jsonl")[0].teacher_versions == {"main": (1, 3)}


@pytest.mark.parametrize(
    ("refresh", "max_staleness", "right", "wrong"),
    [
        ("frozen", 0, [(0, 0), (0, 0), (0, 0)], (1, 1)),
        ("live", 0, [(0, 0), (1, 1), (2, 2)], (2, 3)),
        ("live", 0, [(0, 0), (1, 1), (2, 2)], (1, 2)),  # older than the step
        ("live", 2, [(0, 0), (0, 1), (0, 2)], (2, 3)),
        ("live", 1, [(0, 0), (0, 1), (1, 2)], (0, 2)),  # older than staleness explains
        ("{every=2}", 0, [(0, 0), (0, 0), (2, 2)], (1, 1)),
        ("{every=2}", 1, [(0, 0), (0, 0), (0, 2)], (3, 3)),
    ],
)
def test_an_audit_holds_the_versions_against_the_refresh(
    refresh: str, max_staleness: int, right: list[tuple[int, int]], wrong: tuple[int, int]
) -> None:
    config = selves(f"teachers.main.refresh={refresh}", f"rollout.max_staleness={max_staleness}")
    records = [record_of(step, {"main": versions}) for step, versions in enumerate(right, start=1)]
    assert audit(records, config, ORDER) == 3 * PROMPTS_PER_STEP
    for versions in ({"main": wrong}, {}):
        with pytest.raises(TrainingError, match="ledger record 3: teacher_versions is not what the run asks for"):
            audit([*records[:2], record_of(3, versions)], config, ORDER)


def with_further_row(handle: BatchHandle, place: int) -> BatchHandle:
    """Return a batch in which one episode has a second row."""
    per_row = ("trajectory_ids", "num_tokens", "num_completion_tokens", "prompt_ids")
    per_row += ("min_policy_versions", "max_policy_versions")
    rows = {name: (*getattr(handle, name), getattr(handle, name)[place]) for name in per_row}
    *firsts, further = rows["trajectory_ids"]
    rows |= {"trajectory_ids": (*firsts, row_id(further, 1)), "episode_ids": (*firsts, further)}
    return replace(handle, **rows)


def test_an_episode_of_several_rows_is_one_trajectory_of_the_step(tmp_path: Path) -> None:
    rows = requests_of(0)
    ledger = Ledger(tmp_path / "ledger.jsonl", first_step=0)
    consume(ledger, 1, [with_further_row(batch_of(rows[:4]), 1), replace(batch_of(rows[4:]), num_failed=2)])
    consume(ledger, 2)
    first, second = read_ledger(tmp_path / "ledger.jsonl")
    assert first.trajectory_ids == ((0, 5),)
    assert (first.further_rows, first.failed) == (1, 2)
    assert audit([first, second], CONFIG, ORDER) == 2 * PROMPTS_PER_STEP
    # Records of steps without such episodes are what they were before there were any.
    assert not {"further_rows", "failed"} & json.loads((tmp_path / "ledger.jsonl").read_text().splitlines()[1]).keys()


def test_a_row_of_an_episode_that_came_before_ends_the_step(tmp_path: Path) -> None:
    rows = requests_of(0)
    further = with_further_row(batch_of(rows[:1]), 0)
    alone = replace(
        batch_of(rows[1:2]), trajectory_ids=(row_id(0, 2),), episode_ids=(0,), prompt_ids=further.prompt_ids[:1]
    )
    twice = replace(further, trajectory_ids=(0, 0))
    for given in ([further, alone], [twice]):
        with pytest.raises(TrainingError, match="trajectory 0 came a second time"):
            consume(Ledger(tmp_path / "ledger.jsonl", first_step=0), 1, given)
