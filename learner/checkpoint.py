"""Checkpoints and exports that are complete or absent.

Everything is written into `NAME.partial`, brought to disk, and renamed to `NAME` as the last act; whatever stops the
writing leaves only a partial folder, which the next attempt replaces. All ranks and the driver must see the same file
system under these paths.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cluster.contracts.errors import CheckpointError
from cluster.contracts.weights import plan_buckets
from learner.engine import TrainEngine

STATE_FILE = "state.json"
GATHER_BYTES = 1 << 28  # of parameters that an export gathers at once
_STEP_FOLDER = re.compile(r"step-(\d+)")


def step_folder(directory: Path, step: int) -> Path:
    """Return where the checkpoint taken after `step` completed optimizer steps belongs."""
    return directory / f"step-{step}"


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the complete checkpoint of the highest step; None when there is none."""
    found = _checkpoints(directory)
    return found[-1] if found else None


def prune(directory: Path, keep_last: int) -> None:
    """Remove all but the `keep_last` latest complete checkpoints."""
    for folder in _checkpoints(directory)[:-keep_last]:
        # Out of the way first: a removal that is interrupted must not leave a folder that looks complete.
        doomed = folder.with_name(folder.name + ".removed")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def begin(folder: Path) -> Path:
    """Return an empty partial folder for `commit`, replacing what an earlier attempt left.

    Raises:
        CheckpointError: the place cannot be written to.
    """
    partial = _partial(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder}: cannot create {partial.name}: {error.strerror}") from error
    return partial


def commit(folder: Path) -> None:
    """Bring the partial folder to disk and give it its name; a folder of that name is replaced.

    Raises:
        CheckpointError: the disk is full or the place cannot be written to.
    """
    partial = _partial(folder)
    try:
        for path in sorted(partial.rglob("*")):
            _to_disk(path)
        _to_disk(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        _to_disk(folder.parent)
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder}: cannot be completed: {error.strerror}") from error


def write_state(partial: Path, state: Mapping[str, Any]) -> None:
    """Write the driver's part of a checkpoint."""
    (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """Return the driver's part of a checkpoint.

    Raises:
        CheckpointError: there is no complete checkpoint there.
    """
    try:
        state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {folder}: no readable {STATE_FILE} in it") from error
    return state


def export(engine: TrainEngine, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face directory: model, generation settings and tokenizer; all ranks call this together.

    Rank 0 holds one whole copy of the weights in host memory while it writes.
    """
    weights = _whole_state_dict(engine)
    if engine.rank != 0:
        return
    partial = begin(folder)
    causal_lm = engine.student.causal_lm
    causal_lm.save_pretrained(partial, state_dict=weights)
    tokenizer.save_pretrained(partial)
    commit(folder)


def _whole_state_dict(engine: TrainEngine) -> dict[str, Tensor]:
    dtype = str(engine.student.head.weight.dtype).removeprefix("torch.")
    weights: dict[str, Tensor] = {}
    for bucket in plan_buckets(engine.student.manifest(dtype).tensors, GATHER_BYTES):
        with engine.full_parameters([tensor.name for tensor in bucket]) as parameters:
            if engine.rank == 0:
                weights |= {name: value.to("cpu", copy=True) for name, value in parameters.items()}
    buffers = dict(engine.student.causal_lm.named_buffers())
    persistent = engine.student.causal_lm.state_dict().keys() & buffers.keys()
    return weights | {name: buffers[name].to("cpu", copy=True) for name in persistent}


def _checkpoints(directory: Path) -> list[Path]:
    """Return complete checkpoints from the earliest step to the latest."""
    if not directory.is_dir():
        return []
    steps = {
        int(match[1]): path
        for path in directory.iterdir()
        if (match := _STEP_FOLDER.fullmatch(path.name)) and (path / STATE_FILE).is_file()
    }
    return [steps[step] for step in sorted(steps)]


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
