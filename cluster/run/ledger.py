"""Proves that every trajectory is learned from exactly once: `ledger.jsonl`, one record per optimizer step.

Every batch passes through the ledger on its way to the learner, so a trajectory that is missing, comes twice or was
never requested ends the step before the weights change. `preceptor verify RUN` checks the file afterwards.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cluster.config.replay import replayed_prompts
from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.batches import BatchHandle, BatchSource, ReadyBatches
from cluster.contracts.errors import CheckpointError, TrainingError
from cluster.contracts.files import Record, RecordsFile
from cluster.contracts.requests import RolloutRequest
from cluster.run.hooks import StepHook
from cluster.run.inputs import load_inputs, privileged_requests, step_requests
from cluster.run.prompt_record import read_record
from cluster.weight_sync.manifest import checksum, new_digest
from rollout_workers.prompts import PromptOrder

if TYPE_CHECKING:
    from cluster.run.replay import Replay


class LedgerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Records one optimizer step.

    Example:
        >>> line = '{"step":1,"trajectory_ids":[[0,3]],"prompt_ids":[7,2],"seeds_checksum":"c","policy_versions":[0,0]}'
        >>> msgspec.json.decode(line, type=LedgerRecord).prompt_ids
        (7, 2)
    """

    step: int  # from 1, as in metrics.jsonl
    trajectory_ids: tuple[tuple[int, int], ...]  # consumed: ranges, both ends included
    prompt_ids: tuple[int, ...]  # in the order in which the step requests them
    seeds_checksum: str
    policy_versions: tuple[int, int]  # lowest and highest that sampled a token of the step
    teachers: dict[str, str] = {}
    # Of teachers that are the student: lowest and highest version that scored a row of the step.
    teacher_versions: dict[str, tuple[int, int]] = {}
    privileged: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET  # prompts that a privileged sampler wrote for
    further_rows: int | msgspec.UnsetType = msgspec.UNSET  # of episodes that are several rows; unset: none is
    failed: int | msgspec.UnsetType = msgspec.UNSET  # episodes whose environment failed; unset: none did

    @classmethod
    def of(cls, step: int, requests: Sequence[RolloutRequest], versions: tuple[int, int]) -> "LedgerRecord":
        return cls(
            step,
            ranges(request.trajectory_id for request in requests),
            tuple(request.prompt_id for request in requests if request.sample_index == 0 and not request.is_privileged),
            checksum([request.seed.to_bytes(8, "little") for request in requests]),
            versions,
            privileged=tuple(request.prompt_id for request in requests if request.is_privileged) or msgspec.UNSET,
        )

    @property
    def privileged_ids(self) -> tuple[int, ...]:
        """Return the prompts that a privileged sampler wrote for, in the order of the requests."""
        return self.privileged or ()


class LedgerState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ties a checkpoint to the ledger."""

    checksum: str  # of all lines up to the checkpoint's step
    in_flight: tuple[int, ...]  # steps, from 1, that were requested and not learned from; a resumed run does so again


class Ledger(StepHook):
    """Checks what goes to the learner, and writes a record after each step."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Go on after `first_step` completed steps; the file's records of later ones are dropped."""
        self.finished_step = first_step
        self._file = RecordsFile(path)
        self._file.drop_from(first_step + 1)
        self._digest = new_digest()
        for line in self._file.lines():
            self._digest.update(line.encode() + b"\n")
        self._under_way: dict[int, CheckedBatches] = {}

    def admit(self, step: int, requests: Sequence[RolloutRequest]) -> None:
        self._under_way[step] = CheckedBatches(step, requests)

    def watch(self, step: int, batches: BatchSource) -> BatchSource:
        """Return the batches of a step such that they give out exactly what was requested, or fail."""
        checked = self._under_way[step]
        checked.batches = batches
        return checked

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        line = self._file.write(msgspec.to_builtins(self._under_way.pop(step).record()))
        self._digest.update(line.encode() + b"\n")
        self.finished_step = step
        return {}

    def state(self) -> LedgerState:
        """Bring the file to disk and return what belongs into a checkpoint of the last finished step."""
        self._file.sync()
        return LedgerState(self._digest.hexdigest(), tuple(self._under_way))

    def check(self, state: LedgerState) -> None:
        """Raise CheckpointError if the records kept are not those that the checkpoint was written after."""
        if self._digest.hexdigest() != state.checksum:
            raise CheckpointError(
                f"{self._file.path}: its records are not those of the run's checkpoint; a record was changed or lost, "
                "so it cannot be shown that each trajectory is learned from once"
            )


class CheckedBatches:
    """Counts one step's trajectories before the learner receives them; a BatchSource.

    A TrainingError ends the step when one comes a second time, was not requested or never comes, or when two
    checkpoints of a teacher scored the step.
    """

    def __init__(self, step: int, requests: Sequence[RolloutRequest]) -> None:
        self.batches: BatchSource = ReadyBatches([])
        self._step, self._requests = step, requests
        self._missing = {request.trajectory_id: request.prompt_id for request in requests}
        self._all_ids = frozenset(self._missing)
        self._versions: list[int] = []
        self._teachers: dict[str, str] = {}
        self._teacher_versions: dict[str, tuple[int, int]] = {}
        self._further_rows = self._failed = 0

    @property
    def is_exhausted(self) -> bool:
        if not self.batches.is_exhausted:
            return False
        self._check_complete()
        return True

    @property
    def missing(self) -> int:
        return self.batches.missing

    def take(self, wake_on: Sequence[Any] = ()) -> list[BatchHandle]:
        handles = self.batches.take(wake_on)
        for handle in handles:
            self._count(handle)
        return handles

    def move_on_until(self, references: Sequence[Any]) -> None:
        self.batches.move_on_until(references)

    def record(self) -> LedgerRecord:
        """Return what was consumed, which must be all that the step requested."""
        self._check_complete()
        record = LedgerRecord.of(self._step, self._requests, (min(self._versions), max(self._versions)))
        return msgspec.structs.replace(
            record,
            teachers=self._teachers,
            teacher_versions=self._teacher_versions,
            further_rows=self._further_rows or msgspec.UNSET,
            failed=self._failed or msgspec.UNSET,
        )

    def _count(self, handle: BatchHandle) -> None:
        for teacher, checkpoint in handle.scored_by.items():
            if self._teachers.setdefault(teacher, checkpoint) != checkpoint:
                self._fail(
                    f"two checkpoints of teacher {teacher} scored it, {self._teachers[teacher]} and {checkpoint}"
                )
        for teacher, version in handle.teacher_versions.items():
            lowest, highest = self._teacher_versions.get(teacher, (version, version))
            self._teacher_versions[teacher] = min(lowest, version), max(highest, version)
        self._count_rows(handle)
        self._versions += [*handle.min_policy_versions, *handle.max_policy_versions]

    def _count_rows(self, handle: BatchHandle) -> None:
        if len(set(handle.trajectory_ids)) < len(handle.trajectory_ids):
            twice = max(handle.trajectory_ids, key=handle.trajectory_ids.count)
            self._fail(f"trajectory {twice} came a second time")
        for episode_id, prompt_id in dict.fromkeys(zip(handle.episodes, handle.prompt_ids, strict=True)):
            if episode_id not in self._all_ids:
                self._fail(f"trajectory {episode_id} came, which it does not ask for")
            if episode_id not in self._missing:
                self._fail(f"trajectory {episode_id} came a second time")
            expected = self._missing.pop(episode_id)
            if prompt_id != expected:
                self._fail(f"trajectory {episode_id} answers prompt {prompt_id} instead of {expected}")
        self._further_rows += len(handle.trajectory_ids) - handle.num_episodes
        self._failed += handle.num_failed

    def _check_complete(self) -> None:
        if self._missing:
            parts = [f"{first} to {last}" if last > first else str(first) for first, last in ranges(self._missing)]
            self._fail(f"of its trajectories, {', '.join(parts)} never came")

    def _fail(self, what: str) -> None:
        raise TrainingError(
            f"step {self._step}: {what}; the step was not taken, and --resume goes on from the last checkpoint"
        )


def ranges(ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return ids as the fewest ranges, both ends included.

    Example:
        >>> ranges([5, 0, 1, 2])
        ((0, 2), (5, 5))
    """
    merged: list[tuple[int, int]] = []
    for value in sorted(ids):
        if merged and value == merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], value)
        else:
            merged.append((value, value))
    return tuple(merged)


def read_ledger(path: Path) -> list[LedgerRecord]:
    """Return all records, but a last line that a crash cut short; raise CheckpointError that names what is damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no ledger")
    return RecordsFile(path).decode(LedgerRecord, "no ledger record")


def audit(records: Sequence[LedgerRecord], config: Config, order: PromptOrder, replay: "Replay | None" = None) -> int:
    """Return how many prompt positions were consumed; raise TrainingError if not each once and in order."""
    failed: Counter[int] = Counter()  # completions of each prompt so far, of which all may have failed
    for index, record in enumerate(records):
        requests = [*step_requests(config, order, index), *([] if replay is None else replay.requests(index))]
        expected = LedgerRecord.of(
            index + 1,
            [*requests, *privileged_requests(config, record.privileged_ids, index)],
            record.policy_versions,
        )
        names = ("step", "trajectory_ids", "prompt_ids", "seeds_checksum")
        wrong = [name for name in names if getattr(record, name) != getattr(expected, name)]
        if not _has_due_policies(record, config, index, replay):
            wrong.append("policy_versions")
        if not _has_due_versions(record, config, index):
            wrong.append("teacher_versions")
        if not _may_be_privileged(record, config, failed):
            wrong.append("privileged")
        failed.update(request.prompt_id for request in requests)
        if wrong:
            raise TrainingError(f"ledger record {index + 1}: {wrong[0]} is not what the run asks for in this step")
    return len(records) * config.prompts.prompts_per_step


def _may_be_privileged(record: LedgerRecord, config: Config, failed: Mapping[int, int]) -> bool:
    """Tell whether a privileged sampler's prompts are as few, and were sampled before as often, as the run says."""
    section, chosen = config.rollout.privileged, record.privileged_ids
    if section is None or not chosen:
        return not chosen
    is_quota = len(set(chosen)) == len(chosen) <= section.quota(record.step - 1)
    return is_quota and all(failed[prompt_id] >= section.hard_after for prompt_id in chosen)


def _has_due_policies(record: LedgerRecord, config: Config, step: int, replay: "Replay | None") -> bool:
    """Tell whether weights that the student had by then sampled step `step`, from 0, or the replayed run's weights."""
    due = [] if replay is None else [replay.versions(step)]
    if replayed_prompts(config) < config.prompts.prompts_per_step:
        due.append((step - config.rollout.max_staleness, step))
    lowest, highest = record.policy_versions
    return min(first for first, _ in due) <= lowest <= highest <= max(last for _, last in due)


def _has_due_versions(record: LedgerRecord, config: Config, step: int) -> bool:
    """Tell whether the teachers that are the student scored step `step`, from 0, with weights that they had by then.

    The step's rows were requested when one up to `max_staleness` steps earlier was to be learned from. Of signals that
    another run recorded, nothing is known.
    """
    if config.rollout.replay is not None and config.rollout.replay.signals == "recorded":
        return True
    selves = {name: teacher for name, teacher in config.teachers.items() if teacher.source is not None}
    if record.teacher_versions.keys() != record.teachers.keys() & selves.keys():
        return False
    for name, (lowest, highest) in record.teacher_versions.items():
        first, last = (selves[name].version_due(max(0, at)) for at in (step - config.rollout.max_staleness, step))
        if not (0 if first is None else first) <= lowest <= highest <= (step if last is None else last):
            return False
    return True


def verify_run(directory: RunDirectory) -> str:
    """Audit the ledger of a run against its configuration and metrics, and say in one line what it proves."""
    config = directory.read_config()
    began_with = read_record(directory)
    # Runs of earlier releases kept no record of their prompts.
    order = load_inputs(config).train if began_with is None else began_with.order(config)
    records = read_ledger(directory.ledger)
    replay = None
    if config.rollout.replay is not None:
        from cluster.run.replay import Replay

        replay = Replay(config)
    audit(records, config, order, replay)
    last = max((record["step"] for record in RecordsFile(directory.metrics).read()), default=0)
    if last > len(records):
        raise CheckpointError(f"{directory.ledger}: it ends after step {len(records)}, metrics.jsonl after step {last}")
    beside = sum(len(one.privileged_ids) for one in records)
    num_trajectories = sum(last - first + 1 for one in records for first, last in one.trajectory_ids) - beside
    further, failed = (sum(getattr(one, name) or 0 for one in records) for name in ("further_rows", "failed"))
    rows = f" in {num_trajectories + further} rows" if further else ""
    rows += f", and {beside} of the privileged sampler" if beside else ""
    lost = f"; the environment of {failed} failed, which taught nothing" if failed else ""
    return (
        f"{len(records)} steps, {num_trajectories} trajectories{rows}: each was learned from exactly once, in order"
        f"{lost}{'' if replay is None else _replayed(replay, len(records))}"
    )


def _replayed(replay: "Replay", num_steps: int) -> str:
    """Say how many trajectories were of another run, and how often each, after at least one step."""
    count = sum(len(replay.requests(step)) for step in range(num_steps))
    passes = 1 + replay.epoch(max(0, num_steps - 1))
    times = "one pass" if passes == 1 else f"{passes} passes"
    return f"; {count} of them were recorded by {replay.directory.path}, in {times} over its {replay.num_rows} rows"
