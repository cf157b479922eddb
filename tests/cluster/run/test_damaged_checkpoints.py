"""Whatever is wrong with a checkpoint, a run that is resumed says so in one sentence and reads nothing of it."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import CheckpointError
from cluster.run.checkpoints import find_resume_point
from learner.checkpointing.checkpoint import checkpoints
from learner.checkpointing.manifest import entry_of
from tests.builders import make_config
from tests.learner.checkpointing.checkpoints import run_state, write_checkpoint

Damage = Callable[[Path], None]
FILES = ("manifest.json", "state.json", "rank-0.safetensors", "rank-1.safetensors")
STEP = 6


def cut(name: str, eighths: int) -> Damage:
    def damage(folder: Path) -> None:
        os.truncate(folder / name, (folder / name).stat().st_size * eighths // 8)

    return damage


def flip(name: str, sixteenths: int) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[(len(content) - 1) * sixteenths // 16] ^= 1 << (sixteenths % 8)
        (folder / name).write_bytes(content)

    return damage


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def grow(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes() + b"\0")

    return damage


def put_in_place(name: str, content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def link_elsewhere(folder: Path) -> None:
    (folder / "rank-0.safetensors").rename(folder.parent / "elsewhere")
    (folder / "rank-0.safetensors").symlink_to(folder.parent / "elsewhere")


def edit_manifest(**changed: Any) -> Damage:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, **changed}))

    return damage


def edit_files(change: Callable[[list[dict[str, Any]]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        edit_manifest(files=change(files))(folder)

    return damage


def replace_state(state: Any) -> Damage:
    """Write another state whose checksum is right: somebody edited both files."""

    def damage(folder: Path) -> None:
        path = folder / "state.json"
        path.write_text(state if isinstance(state, str) else json.dumps(state))
        entry = entry_of(path)
        edit_files(
            lambda files: [
                {**file, "num_bytes": entry.num_bytes, "checksum": entry.checksum}
                if file["name"] == "state.json"
                else file
                for file in files
            ]
        )(folder)

    return damage


def state_with(**changed: Any) -> Damage:
    return replace_state({**run_state(STEP), **changed})


def without(key: str) -> Damage:
    return replace_state({name: value for name, value in run_state(STEP).items() if name != key})


def all_damages() -> Iterator[tuple[str, Damage]]:
    for name in FILES:
        yield from ((f"{name} cut at {eighths}/8", cut(name, eighths)) for eighths in range(0, 8, 2))
        yield from ((f"{name} flipped at {place}/16", flip(name, place)) for place in range(0, 17, 4))
        yield f"{name} removed", remove(name)
        yield f"{name} longer", grow(name)
        yield f"{name} is a pickle", put_in_place(name, b"\x80\x04cos\nsystem\n.")
    yield "a foreign file", put_in_place("zero_to_fp32.py", b"print()")
    yield "a foreign file with a strange name", put_in_place("a\nb", b"")
    yield "a shard is a link", link_elsewhere
    for name, value in [
        ("format_version", 0),
        ("format_version", 2),
        ("format_version", "1"),
        ("format_version", None),
        ("num_ranks", 1),
        ("num_ranks", 3),
        ("num_ranks", -1),
        ("num_ranks", 10**30),
        ("zero_stage", 3),
        ("zero_stage", True),
        ("files", {}),
        ("files", []),
        ("files", [1]),
        ("unknown", 1),
    ]:
        yield f"manifest {name} = {value}", edit_manifest(**{name: value})
    yield "a file is not listed", edit_files(lambda files: files[:-1])
    yield "a file is listed twice", edit_files(lambda files: [*files, files[0]])
    yield "a path out of the folder", edit_files(lambda files: [{**files[0], "name": "../../x"}, *files[1:]])
    yield "sizes of another type", edit_files(lambda files: [{**file, "num_bytes": "9"} for file in files])
    yield (
        "checksums exchanged",
        edit_files(lambda files: [{**file, "checksum": files[0]["checksum"]} for file in files]),
    )
    for text in ("", "[]", "1", "null", '"step"', "{", '{"step": 6', "[" * 100_000, "\x00", '{"step": 1e999}'):
        yield f"state is {text[:20]!r}", replace_state(text)
    for key in ("step", "history", "ledger"):
        yield f"state without {key}", without(key)
    for name, value in [
        ("step", "6"),
        ("step", -1),
        ("step", 7),
        ("step", 6.5),
        ("step", None),
        ("step", 10**40),
        ("history", []),
        ("history", {"last_kl": "low"}),
        ("history", {"teacher_accuracy": [1]}),
        ("ledger", None),
        ("ledger", {"checksum": 1, "in_flight": []}),
        ("ledger", {"checksum": "0", "in_flight": [9]}),
        ("ledger", {"checksum": "0", "in_flight": "7"}),
        ("ledger", {"checksum": "0"}),
        ("unknown", 1),
    ]:
        yield f"state {name} = {str(value)[:30]}", state_with(**{name: value})


DAMAGES = dict(all_damages())


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunDirectory, Config]:
    """Return a run with one checkpoint."""
    config = make_config(f"run.directory='{tmp_path}'", "learner.num_workers=2", "learner.zero_stage=2")
    directory = RunDirectory.create(config)
    write_checkpoint(directory.checkpoints, STEP)
    return directory, config


def test_there_are_many_kinds_of_damage() -> None:
    assert len(DAMAGES) >= 60


def test_an_intact_checkpoint_is_taken_without_a_word(run: tuple[RunDirectory, Config]) -> None:
    directory, config = run
    said: list[str] = []
    assert find_resume_point(directory, config, said.append).step == STEP
    assert said == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_one_sentence_that_names_it(run: tuple[RunDirectory, Config], name: str) -> None:
    directory, config = run
    [folder] = checkpoints(directory.checkpoints)
    DAMAGES[name](folder)
    with pytest.raises(CheckpointError) as refused:
        find_resume_point(directory, config, lambda _: None)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < len(str(folder)) + 300


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", list(DAMAGES)[::7])
def test_the_newest_intact_checkpoint_is_taken_and_the_damaged_one_named(
    run: tuple[RunDirectory, Config], name: str
) -> None:
    directory, config = run
    older = {path: path.read_bytes() for path in write_checkpoint(directory.checkpoints, STEP - 2).iterdir()}
    write_checkpoint(directory.checkpoints, STEP - 4)
    DAMAGES[name](directory.checkpoints / f"step-{STEP}")
    said: list[str] = []
    assert find_resume_point(directory, config, said.append).step == STEP - 2
    [warning] = said
    assert f"step-{STEP}:" in warning
    assert all(path.read_bytes() == content for path, content in older.items())


def test_every_single_flipped_bit_of_the_manifest_is_found(run: tuple[RunDirectory, Config]) -> None:
    directory, config = run
    path = directory.checkpoints / f"step-{STEP}" / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            with pytest.raises(CheckpointError):
                find_resume_point(directory, config, lambda _: None)


def test_a_run_that_wrote_no_checkpoint_begins_at_its_first_step(tmp_path: Path) -> None:
    config = make_config(f"run.directory='{tmp_path}'")
    assert find_resume_point(RunDirectory.create(config), config, lambda _: None) is None
