"""Writes and checks a checkpoint's manifest: its files with sizes and checksums, and the ranks they are of."""

import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.config.stages import LearnerConfig
from cluster.contracts.errors import CheckpointError
from cluster.weight_sync.manifest import new_digest

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
READ_BYTES = 1 << 22
READERS = 4  # files whose checksums are computed at once


@dataclass(frozen=True)
class FileEntry:
    """Describes one file of a checkpoint."""

    name: str
    num_bytes: int
    checksum: str


@dataclass(frozen=True)
class WrittenShard:
    """Describes one rank's file and what it cost."""

    entry: FileEntry
    write_seconds: float


@dataclass(frozen=True)
class Layout:
    """Says how the training state is cut into shards, which a group of another layout cannot read."""

    num_ranks: int
    zero_stage: int

    @classmethod
    def of(cls, config: LearnerConfig) -> "Layout":
        return cls(config.num_workers, config.zero_stage)


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Is the contents of manifest.json."""

    format_version: int
    num_ranks: int
    zero_stage: int
    files: list[FileEntry]


class _Versioned(msgspec.Struct):
    format_version: int


def shard_name(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def write_manifest(folder: Path, layout: Layout, files: Iterable[FileEntry]) -> None:
    """Write manifest.json into a folder that holds all other files already."""
    manifest = Manifest(FORMAT_VERSION, layout.num_ranks, layout.zero_stage, list(files))
    (folder / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


@contextmanager
def file_errors(what_failed: str) -> Iterator[None]:
    """Turn an OSError into a CheckpointError of one sentence."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what_failed}: {error.strerror}") from error


def entry_of(path: Path) -> FileEntry:
    """Read a file and return what the manifest says of it."""
    digest, num_bytes = new_digest(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return FileEntry(path.name, num_bytes, digest.hexdigest())


def verify(folder: Path, layout: Layout) -> None:
    """Raise CheckpointError that names the file if a checkpoint is not what its manifest says, or of another layout."""
    manifest = _read(folder)
    if (manifest.num_ranks, manifest.zero_stage) != (layout.num_ranks, layout.zero_stage):
        raise CheckpointError(
            f"checkpoint {folder}: {MANIFEST_FILE} is of learner.num_workers = {manifest.num_ranks} and "
            f"learner.zero_stage = {manifest.zero_stage}, but the run has {layout.num_ranks} and {layout.zero_stage}"
        )
    _check_names(folder, manifest, layout)
    with ThreadPoolExecutor(READERS) as readers:
        for _ in readers.map(lambda entry: _check_file(folder, entry), manifest.files):
            pass


def _read(folder: Path) -> Manifest:
    with file_errors(f"checkpoint {folder}: no readable {MANIFEST_FILE} in it"):
        content = (folder / MANIFEST_FILE).read_bytes()
    try:
        version = msgspec.json.decode(content, type=_Versioned).format_version
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint {folder}: {MANIFEST_FILE} has format version {version}, but this program reads "
                f"{FORMAT_VERSION}; resume with the release that wrote it"
            )
        return msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST_FILE} is damaged: {error}") from error


def _check_names(folder: Path, manifest: Manifest, layout: Layout) -> None:
    expected = sorted([STATE_FILE, *map(shard_name, range(layout.num_ranks))])
    if sorted(entry.name for entry in manifest.files) != expected:
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST_FILE} does not list exactly {', '.join(expected)}")
    present = {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
    for name in expected:
        if name not in present:
            raise CheckpointError(f"checkpoint {folder}: {name} is missing")
    for name in sorted(present.difference(expected)):
        raise CheckpointError(f"checkpoint {folder}: {name!r} does not belong to it; remove it or the checkpoint")


def _check_file(folder: Path, entry: FileEntry) -> None:
    path = folder / entry.name
    with file_errors(f"checkpoint {folder}: cannot read {entry.name}"):
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"checkpoint {folder}: {entry.name} is not an ordinary file")
        if status.st_size != entry.num_bytes:
            sizes = f"{status.st_size} bytes where {MANIFEST_FILE} says {entry.num_bytes}"
            raise CheckpointError(f"checkpoint {folder}: {entry.name} has {sizes}")
        if entry_of(path) != entry:
            raise CheckpointError(f"checkpoint {folder}: {entry.name} has another checksum than {MANIFEST_FILE} says")
