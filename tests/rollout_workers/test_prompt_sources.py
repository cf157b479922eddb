"""What is read from each kind of source: which rows, under which names."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config.data_source import parse_source
from cluster.contracts.errors import PromptError
from rollout_workers.prompt_sources import HELD_OUT_SPLITS, TRAIN_SPLITS, guess_columns, read_rows
from tests.malformed.refusal import assert_refused

ROWS: list[dict[str, Any]] = [{"prompt": "a, b", "answer": "007"}, {"prompt": 'two\nlines of "c"', "answer": None}]


def rows(source: str | Path, splits: tuple[str, ...] = TRAIN_SPLITS) -> list[Any]:
    return [row for _, row in read_rows(str(source), splits)]


def write_hub_folder(folder: Path) -> Path:
    """Write a data set of two subsets and two splits as the hub lays them out; each row names where it is from."""
    head = ["---", "configs:"]
    for subset in ("main", "socratic"):
        (folder / subset).mkdir(parents=True)
        head += [f"- config_name: {subset}", "  data_files:"]
        for split in ("train", "test"):
            table = pa.table({"question": [f"{subset} {split}"], "answer": ["2 + 2 = 4 #### 4"]})
            pq.write_table(table, folder / subset / f"{split}-00000-of-00001.parquet")
            head += [f"  - split: {split}", f"    path: {subset}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*head, "---", ""]))
    return folder


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.parquet", "p.csv"])
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "p.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif name == "p.csv":
        path.write_text('prompt,answer\n"a, b",007\n"two\nlines of ""c""",\n')
    else:
        path.write_text(json.dumps(ROWS) if name == "p.json" else "".join(json.dumps(row) + "\n" for row in ROWS))
    assert rows(path) == ROWS


def test_a_text_file_has_a_prompt_per_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Wie geht's? 你好\n\n[1, 2] are?\n")
    expected = [
        (f"{tmp_path}/p.txt:1", {"prompt": "Wie geht's? 你好"}),
        (f"{tmp_path}/p.txt:3", {"prompt": "[1, 2] are?"}),
    ]
    assert list(read_rows(str(tmp_path / "p.txt"))) == expected
    (tmp_path / "p.txt").write_text('{"prompt": "a"}\n')  # which other programs write under this name
    assert rows(str(tmp_path / "p.txt")) == [{"prompt": "a"}]


@pytest.mark.parametrize(("name", "content"), [("p.jsonl.gz", '{"prompt": "a"}\n'), ("p.txt.gz", "a\n")])
def test_a_packed_file_is_read_as_what_it_holds(tmp_path: Path, name: str, content: str) -> None:
    packed = gzip.compress(content.encode())
    (tmp_path / name).write_bytes(packed)
    assert rows(str(tmp_path / name)) == [{"prompt": "a"}]
    (tmp_path / name).write_bytes(packed[:-6])
    assert_refused(lambda: rows(str(tmp_path / name)), PromptError, "cannot unpack the prompt file")


def test_empty_lines_are_passed_over_and_the_others_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n\n \t\n{"prompt": "b"}\n\n')
    assert [where.rpartition(":")[2] for where, _ in read_rows(str(tmp_path / "p.jsonl"))] == ["1", "4"]


def test_nulls_that_a_table_adds_to_messages_are_not_there_and_bytes_are_left_out(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b", "name": "f"}]
    table = pa.table({"messages": [messages], "image": [{"bytes": b"\x00", "path": "x"}]})
    pq.write_table(table, tmp_path / "p.parquet")
    assert rows(tmp_path / "p.parquet") == [{"messages": messages}]


def test_a_folder_that_is_laid_out_as_on_the_hub_has_subsets_and_splits(tmp_path: Path, monkeypatch: Any) -> None:
    folder = write_hub_folder(tmp_path / "gsm8k")
    assert rows(f"{folder}/main")[0]["question"] == "main train"
    assert rows(f"{folder}/main", HELD_OUT_SPLITS)[0]["question"] == "main test"
    assert rows(f"{folder}/socratic:test[:1]")[0]["question"] == "socratic test"
    for source, says in ((f"{folder}", "['main', 'socratic']"), (f"{folder}/main:dev", 'Unknown split "dev"')):
        assert_refused(lambda source=source: rows(source), PromptError, says)


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_refused(lambda: rows("openai/gsm8k/main"), PromptError, "openai/gsm8k: there is no such file or folder, and")


def test_a_hub_that_is_away_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"it waits {seconds} s to ask again"))
    assert_refused(lambda: rows("openai/gsm8k/main"), PromptError, "openai/gsm8k: there is no such file or folder, and")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_what_a_source_names_follows_from_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub = parse_source("openai/gsm8k/main:train[:100]")
    assert (hub.kind, hub.place, hub.subset, hub.split) == ("hub", "openai/gsm8k", "main", "train[:100]")
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    assert parse_source("openai/gsm8k:test").kind == "folder"
    assert parse_source("data/absent.jsonl").kind == "file"
    (tmp_path / "a:b.jsonl").touch()
    assert parse_source("a:b.jsonl").split is None
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    assert_refused(lambda: rows("p.jsonl:test"), PromptError, "a file has no splits")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "q", "answer": "a"}, {"prompt": "question", "answer": "answer"}),
        ({"problem": "q", "solution": "s", "input": "i"}, {"prompt": "problem", "answer": "solution"}),
        (
            {"prompt": [], "reward_model": {"ground_truth": "4"}},
            {"prompt": "prompt", "answer": "reward_model.ground_truth"},
        ),
        ({"text": "t"}, {}),
    ],
)
def test_the_likeliest_columns_are_guessed(row: dict[str, Any], expected: dict[str, str]) -> None:
    assert guess_columns(row) == expected
