"""Writes checkpoints that are complete or absent.

Everything is written into `NAME.partial`, brought to disk, and renamed to `NAME` as the last act; whatever stops the
writing leaves only a partial folder, which the next attempt replaces. All ranks and the driver must see the same file
system under these paths. What the file system refuses is a CheckpointError.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contracts.errors import CheckpointError, PreceptorError
from learner.checkpointing.manifest import (
    MANIFEST_FILE,
    STATE_FILE,
    FileEntry,
    Layout,
    WrittenShard,
    entry_of,
    file_errors,
    write_manifest,
)

PARTIAL, REMOVED, DAMAGED = ".partial", ".removed", ".damaged"
_STEP_FOLDER = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_LEFTOVER = re.compile(_STEP_FOLDER.pattern + r"(\.partial|\.removed)")


def step_folder(directory: Path, step: int) -> Path:
    """Return where the checkpoint taken after `step` completed optimizer steps belongs."""
    return directory / f"step-{step}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def checkpoints(directory: Path) -> list[Path]:
    """Return the folders of checkpoints, whole or damaged, from the earliest step to the latest."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _STEP_FOLDER.fullmatch(path.name)), key=step_of)


def prune(directory: Path, keep_last: int) -> None:
    """Remove all but the `keep_last` latest complete checkpoints."""
    complete = [folder for folder in checkpoints(directory) if (folder / MANIFEST_FILE).is_file()]
    for folder in complete[:-keep_last]:
        _remove(folder)


def tidy(directory: Path, last_step: int) -> None:
    """Make the folder what a run needs that goes on after `last_step`.

    What a killed run left half-written or half-removed goes. Checkpoints of later steps, which were passed over since
    they are damaged, are set aside as NAME.damaged, so that they neither count nor are taken up again.
    """
    with file_errors(f"{directory}: cannot be tidied up"):
        for path in sorted(directory.iterdir()) if directory.is_dir() else []:
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path)
        for folder in checkpoints(directory):
            if step_of(folder) > last_step:
                aside = folder.with_name(folder.name + DAMAGED)
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)


def begin(folder: Path) -> Path:
    """Return an empty partial folder for `commit`, replacing what an earlier attempt left."""
    partial = _partial(folder)
    with file_errors(f"checkpoint {folder}: cannot create {partial.name}"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    return partial


def commit(folder: Path, state: Mapping[str, Any], layout: Layout, shards: Sequence[FileEntry]) -> None:
    """Complete a checkpoint whose shards are written: add the driver's state and the manifest, and publish it."""
    partial = _partial(folder)
    with file_errors(f"checkpoint {folder}: cannot be completed"):
        path = partial / STATE_FILE
        path.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        write_manifest(partial, layout, [*shards, entry_of(path)])
    publish(folder)


def discard(folder: Path) -> None:
    """Remove what `begin` began, as far as that is possible."""
    shutil.rmtree(_partial(folder), ignore_errors=True)


def publish(folder: Path) -> None:
    """Bring the partial folder to disk and give it its name; a folder of that name is replaced."""
    partial = _partial(folder)
    with file_errors(f"checkpoint {folder}: cannot be completed"):
        for path in sorted(partial.rglob("*")):
            _to_disk(path)
        _to_disk(partial)
        if folder.exists():
            _remove(folder)
        partial.rename(folder)
        _to_disk(folder.parent)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the driver's part of a checkpoint; raise CheckpointError if it is missing or no JSON object."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {folder}: no readable {STATE_FILE} in it") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {folder}: {STATE_FILE} holds no JSON object")
    return state


def _remove(folder: Path) -> None:
    # Renamed first: a removal that is interrupted must not leave a folder that looks complete.
    doomed = folder.with_name(folder.name + REMOVED)
    with file_errors(f"checkpoint {folder}: cannot be removed"):
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + PARTIAL)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class CheckpointSeconds:
    """Says what a checkpoint cost."""

    held: float  # training waited for the copy to host memory, on the slowest rank
    writing: float  # of the slowest rank


class PendingCheckpoint:
    """Lets the ranks write their shards, and completes the folder when all have.

    An error of any rank removes the partial folder; earlier checkpoints are not touched.
    """

    def __init__(self, folder: Path, state: Mapping[str, Any], layout: Layout, ask: Callable[..., list[Any]]) -> None:
        """Begin: returns when every rank has copied its state; `ask` calls a method of every rank.

        All ranks and the driver share the folder's file system; `state`, of JSON values, must not change any more.
        """
        self.folder, self._state, self._layout, self._ask = folder, state, layout, ask
        self._held_seconds = max(self._ask_or_discard("begin_shard", begin(folder)))

    @property
    def is_written(self) -> bool:
        """Return whether `complete` would not wait for a rank."""
        return all(self._ask_or_discard("shard_is_written"))

    def complete(self) -> CheckpointSeconds:
        """Wait for the ranks and give the folder its name; an error is raised, and leaves nothing of the checkpoint."""
        shards: list[WrittenShard] = self._ask_or_discard("finish_shard")
        try:
            commit(self.folder, self._state, self._layout, [shard.entry for shard in shards])
        except PreceptorError:
            discard(self.folder)
            raise
        return CheckpointSeconds(self._held_seconds, max(shard.write_seconds for shard in shards))

    def _ask_or_discard(self, method: str, *args: Any) -> list[Any]:
        try:
            return self._ask(method, *args, waiting_for=f"the learner to write checkpoint {self.folder}")
        except PreceptorError:
            discard(self.folder)
            raise
