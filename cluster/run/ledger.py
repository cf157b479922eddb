"""The proof that every trajectory is learned from exactly once: `ledger.jsonl`, one record per optimizer step.

Every batch passes through the ledger on its way to the learner, so a trajectory that is missing, comes twice or was
never asked for ends the step before the weights change.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cluster.contracts.batches import BatchHandle, BatchSource
from cluster.contracts.errors import CheckpointError, TrainingError
from cluster.contracts.files import RecordsFile
from cluster.contracts.requests import RolloutRequest
from cluster.weight_sync.manifest import checksum, new_digest


class Asked(msgspec.Struct, frozen=True):
    """What a step asks for, in short."""

    trajectory_ids: tuple[tuple[int, int], ...]  # ranges, both ends included
    prompt_ids: tuple[int, ...]  # in the order in which the step asks them
    seeds_checksum: str

    @classmethod
    def of(cls, requests: Sequence[RolloutRequest]) -> "Asked":
        """Sum up the requests of one step."""
        return cls(
            ranges(request.trajectory_id for request in requests),
            tuple(request.prompt_id for request in requests if request.sample_index == 0),
            checksum([request.seed.to_bytes(8, "little") for request in requests]),
        )


class LedgerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One optimizer step.

    Example:
        >>> line = '{"step":1,"trajectory_ids":[[0,3]],"prompt_ids":[7,2],"seeds_checksum":"c","policy_versions":[0,0]}'
        >>> msgspec.json.decode(line, type=LedgerRecord).prompt_ids
        (7, 2)
    """

    step: int  # from 1, as in metrics.jsonl
    trajectory_ids: tuple[tuple[int, int], ...]  # consumed: ranges, both ends included
    prompt_ids: tuple[int, ...]
    seeds_checksum: str
    policy_versions: tuple[int, int]  # lowest and highest that wrote a token of the step
    teachers: dict[str, str] = {}


class LedgerState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a checkpoint keeps of the ledger."""

    checksum: str  # of all lines up to the checkpoint's step
    in_flight: tuple[int, ...]  # steps, from 1, that were asked for and not learned from; a resumed run asks again


class Ledger:
    """Watches what goes to the learner, and writes it down."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Go on after `first_step` completed steps; what the file says of later ones is dropped.

        Raises:
            CheckpointError: the file is damaged.
        """
        self._file = RecordsFile(path)
        self._file.drop_from(first_step + 1)
        self._digest = new_digest()
        for line in self._file.lines():
            self._digest.update(line.encode() + b"\n")
        self._under_way: dict[int, StepLedger] = {}

    def admit(self, step: int, requests: Sequence[RolloutRequest]) -> None:
        """Note what a step, from 1, asks for."""
        self._under_way[step] = StepLedger(step, requests)

    def watch(self, step: int, batches: BatchSource) -> BatchSource:
        """Return the batches of a step such that they give out exactly what was asked for, or fail."""
        return CheckedBatches(batches, self._under_way[step])

    def close(self, step: int) -> None:
        """Write down a step that was learned from.

        Raises:
            TrainingError: the learner did not take all of it.
        """
        record = self._under_way.pop(step).record()
        line = self._file.write(msgspec.to_builtins(record))
        self._digest.update(line.encode() + b"\n")

    def state(self) -> LedgerState:
        """Bring the file to disk and return what belongs into a checkpoint of the last closed step."""
        self._file.sync()
        return LedgerState(self._digest.hexdigest(), tuple(self._under_way))

    def check(self, state: LedgerState) -> None:
        """Compare the records kept with those that the checkpoint was written after.

        Raises:
            CheckpointError: they differ.
        """
        if self._digest.hexdigest() != state.checksum:
            raise CheckpointError(
                f"{self._file.path}: its records are not those of the run's checkpoint; a record was changed or lost, "
                "so it cannot be shown that each trajectory is learned from once"
            )


class StepLedger:
    """Counts the trajectories of one step."""

    def __init__(self, step: int, requests: Sequence[RolloutRequest]) -> None:
        """Take the step from 1, and what it asks for."""
        self._step = step
        self._asked = Asked.of(requests)
        self._missing = {request.trajectory_id: request.prompt_id for request in requests}
        self._all_ids = frozenset(self._missing)
        self._versions: list[int] = []
        self._teachers: dict[str, str] = {}

    def count(self, handle: BatchHandle) -> None:
        """Take note of a batch.

        Raises:
            TrainingError: a trajectory comes a second time, the step does not ask for it, or another checkpoint of a
                teacher scored it than those before.
        """
        for teacher, checkpoint in handle.scored_by.items():
            if self._teachers.setdefault(teacher, checkpoint) != checkpoint:
                self._fail(
                    f"two checkpoints of teacher {teacher} scored it, {self._teachers[teacher]} and {checkpoint}"
                )
        for trajectory_id, prompt_id in zip(handle.trajectory_ids, handle.prompt_ids, strict=True):
            self._count(trajectory_id, prompt_id)
        self._versions += [*handle.min_policy_versions, *handle.max_policy_versions]

    def check_complete(self) -> None:
        """Check that nothing is missing.

        Raises:
            TrainingError: a trajectory is.
        """
        if self._missing:
            parts = [f"{first} to {last}" if last > first else str(first) for first, last in ranges(self._missing)]
            self._fail(f"of its trajectories, {', '.join(parts)} never came")

    def record(self) -> LedgerRecord:
        """Return what was consumed.

        Raises:
            TrainingError: that is not all that the step asks for.
        """
        self.check_complete()
        asked, versions = self._asked, (min(self._versions), max(self._versions))
        return LedgerRecord(
            self._step, asked.trajectory_ids, asked.prompt_ids, asked.seeds_checksum, versions, self._teachers
        )

    def _count(self, trajectory_id: int, prompt_id: int) -> None:
        if trajectory_id not in self._all_ids:
            self._fail(f"trajectory {trajectory_id} came, which it does not ask for")
        if trajectory_id not in self._missing:
            self._fail(f"trajectory {trajectory_id} came a second time")
        expected = self._missing.pop(trajectory_id)
        if prompt_id != expected:
            self._fail(f"trajectory {trajectory_id} answers prompt {prompt_id} instead of {expected}")

    def _fail(self, what: str) -> None:
        raise TrainingError(
            f"step {self._step}: {what}; the step was not taken, and --resume goes on from the last checkpoint"
        )


@dataclass(frozen=True)
class CheckedBatches:
    """A BatchSource: one step's batches, each counted before anybody learns from it."""

    batches: BatchSource
    consumption: StepLedger

    @property
    def is_exhausted(self) -> bool:
        """Return whether every batch was given out.

        Raises:
            TrainingError: that was not all that the step asks for.
        """
        if not self.batches.is_exhausted:
            return False
        self.consumption.check_complete()
        return True

    def take(self, wake_on: Sequence[Any] = ()) -> list[BatchHandle]:
        """Pass on the batches that were not given out yet.

        Raises:
            TrainingError: a trajectory comes a second time, or the step does not ask for it.
        """
        handles = self.batches.take(wake_on)
        for handle in handles:
            self.consumption.count(handle)
        return handles


def ranges(ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return ids as the fewest ranges, both ends included.

    Example:
        >>> ranges([5, 0, 1, 2])
        ((0, 2), (5, 5))
    """
    found: list[tuple[int, int]] = []
    for value in sorted(ids):
        if found and value == found[-1][1] + 1:
            found[-1] = (found[-1][0], value)
        else:
            found.append((value, value))
    return tuple(found)


def read_ledger(path: Path) -> list[LedgerRecord]:
    """Return all records of a ledger; a last line that a crash cut short does not count.

    Raises:
        CheckpointError: the file is missing, or a line is no record; names the line.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no ledger")
    found = []
    for number, line in enumerate(RecordsFile(path).lines(), start=1):
        try:
            found.append(msgspec.json.decode(line, type=LedgerRecord))
        except msgspec.DecodeError as error:
            raise CheckpointError(f"{path}:{number}: no ledger record: {error}") from error
    return found


@dataclass(frozen=True)
class AuditedRun:
    """What a ledger is held against: a run's numbers, and what each of its steps, from 0, asks for."""

    prompts_per_step: int
    samples_per_prompt: int
    max_staleness: int
    take_prompts: Callable[[int, int], list[int]]  # first position, count -> prompt ids, as PromptOrder.take
    requests: Callable[[int], Sequence[RolloutRequest]]


def audit(records: Sequence[LedgerRecord], run: AuditedRun) -> int:
    """Check that every prompt position was consumed exactly once and in order; return how many there are.

    Raises:
        TrainingError: a record is not what the run's configuration asks for; names the step.
    """
    for index, record in enumerate(records):
        first, count = index * run.prompts_per_step, run.prompts_per_step
        samples = run.samples_per_prompt
        lowest, highest = record.policy_versions
        expectations = [
            ("step", record.step, index + 1),
            ("trajectory_ids", record.trajectory_ids, ((first * samples, (first + count) * samples - 1),)),
            ("prompt_ids", list(record.prompt_ids), run.take_prompts(first, count)),
            ("seeds_checksum", record.seeds_checksum, Asked.of(run.requests(index)).seeds_checksum),
            ("policy_versions", index - run.max_staleness <= lowest <= highest <= index, True),
        ]
        for name, found, expected in expectations:
            if found != expected:
                raise TrainingError(f"ledger record {index + 1}: {name} is not what the run asks for in this step")
    return len(records) * run.prompts_per_step
