"""`preceptor verify` on the ledger of a real run, whole and damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from tests.end_to_end.conftest import STEPS, ShortRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Records = list[dict[str, Any]]


def test_a_runs_ledger_proves_that_each_trajectory_was_learned_from_once(short_run: ShortRun, capsys: Any) -> None:
    assert main(["verify", str(short_run.path)]) == 0
    assert capsys.readouterr().out == (
        f"{STEPS} steps, {STEPS * 32} trajectories: each was learned from exactly once, in order\n"
    )


def test_a_run_is_not_resumed_with_another_number_of_prompts(short_run: ShortRun, tmp_path: Path, capsys: Any) -> None:
    """What follows is refused before anything starts, and the run stays as it is."""
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "12 : 27 25 9 |"}\n')
    before = (short_run.path / "prompts.json").read_bytes()
    assert main(["train", "--resume", str(short_run.path), "run.steps=99", f"prompts.train={path}"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "training prompts and would go on with 1, so its prompt ids would name others" in line
    assert (short_run.path / "prompts.json").read_bytes() == before


def lose_the_last(records: Records) -> Records:
    return records[:-1]


def repeat_the_second(records: Records) -> Records:
    return [*records[:2], records[1], *records[2:]]


def change_a_seed(records: Records) -> Records:
    return [*records[:2], {**records[2], "seeds_checksum": "0"}, *records[3:]]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lose_the_last, f"it ends after step {STEPS - 1}, metrics.jsonl after step {STEPS}"),
        (repeat_the_second, "ledger record 3: step is not what the run asks for in this step"),
        (change_a_seed, "ledger record 3: seeds_checksum is not what the run asks for in this step"),
    ],
)
def test_a_damaged_ledger_is_one_sentence_and_a_failure(
    short_run: ShortRun, tmp_path: Path, capsys: Any, damage: Callable[[Records], Records], sentence: str
) -> None:
    for name in ("config.json", "prompts.json", "metrics.jsonl", "ledger.jsonl"):
        shutil.copy(short_run.path / name, tmp_path / name)
    ledger = tmp_path / "ledger.jsonl"
    records = damage([json.loads(line) for line in ledger.read_text().splitlines()])
    ledger.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["verify", str(tmp_path)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(sentence)
