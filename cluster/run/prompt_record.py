"""Ties a run to the prompts that it began with: `prompts.json` in its directory.

A resumed run asks each step again by prompt ids, so they must name the same prompts as before.
"""

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import CheckpointError, PromptError
from cluster.contracts.files import read_text, write_atomically
from rollout_workers.prompts import PromptOrder

if TYPE_CHECKING:
    from cluster.run.inputs import Inputs

MAX_RECORD_BYTES = 1 << 16


class PromptRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Records the prompts that a run began with."""

    num_train: int
    num_held_out: int
    checksum: str  # of all prompts' tokens, answers and teachers
    began_at: datetime  # what chat templates take for the time, also when the run is resumed

    @classmethod
    def of(cls, inputs: "Inputs") -> "PromptRecord":
        num_train = inputs.train.num_prompts
        return cls(num_train, len(inputs.prompts) - num_train, inputs.prompts.checksum, inputs.read_at)

    def order(self, config: Config) -> PromptOrder:
        """Return the order of the training prompts, without reading them."""
        return PromptOrder(self.num_train, config.run.seed, config.prompts.shuffle)


def write_record(directory: RunDirectory, inputs: "Inputs") -> None:
    directory.prompts.touch(mode=0o600)
    write_atomically(directory.prompts, msgspec.json.encode(PromptRecord.of(inputs)).decode() + "\n")


def read_record(directory: RunDirectory) -> PromptRecord | None:
    """Return what the run began with; None if it wrote no record, as earlier releases did not."""
    if not directory.prompts.exists():
        return None
    text = read_text(directory.prompts, "record of the run's prompts", CheckpointError, MAX_RECORD_BYTES)
    try:
        return msgspec.json.decode(text, type=PromptRecord)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{directory.prompts}: no record of a run's prompts: {error}") from error


def compare_prompts(directory: RunDirectory, record: PromptRecord, inputs: "Inputs") -> list[str]:
    """Return a warning if the prompts are others than those that the run began with.

    Raises:
        PromptError: there is another number of training prompts, so the ledger's ids would name other prompts.
    """
    present = PromptRecord.of(inputs)
    if present.num_train != record.num_train:
        raise PromptError(
            f"{directory.path}: the run began with {record.num_train:,} training prompts and would go on with "
            f"{present.num_train:,}, so its prompt ids would name others; restore the prompts and the settings that "
            "choose among them, or start a new run from a checkpoint's export"
        )
    if (present.checksum, present.num_held_out) == (record.checksum, record.num_held_out):
        return []
    return [
        "warning: the prompts are not those that the run began with (another file, chat template, tokenizer or "
        "setting), so steps that are done again have other tokens, and held-out results may not compare"
    ]
