import json
import math
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from cluster.contracts.errors import CheckpointError
from cluster.contracts.files import RecordsFile
from cluster.monitoring.sinks import LiveView, PlainView, terminal_view


def test_each_step_is_one_json_object_and_nan_is_null(tmp_path: Path) -> None:
    RecordsFile(tmp_path / "m.jsonl").write({"step": 3, "train/kl": math.nan})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 3, "train/kl": None}


def test_a_resumed_run_forgets_the_steps_that_it_does_again(tmp_path: Path) -> None:
    file = RecordsFile(tmp_path / "m.jsonl")
    for step in range(5):
        file.write({"step": step})
    file.drop_from(3)
    file.write({"step": 3})
    assert [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [0, 1, 2, 3]


def test_a_pipe_gets_one_plain_line_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    PlainView().show({"step": 4, "train/kl": 0.25, "unknown": 1.0, "held_out/accuracy": math.nan})
    assert capsys.readouterr().out == "step 4  KL/token 0.2500\n"


def test_a_reward_of_functions_is_not_called_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("accuracy", "reward"):
        with terminal_view("demo", 20, name) as view:
            view.show({"step": 4, "rollout/reward": 0.25})
    assert capsys.readouterr().out == "step 4  accuracy 0.250\nstep 4  reward 0.250\n"


def test_a_terminal_gets_what_is_said_above_and_how_the_run_stands_below() -> None:
    console = Console(file=StringIO(), force_terminal=True, width=120)
    view = LiveView(console, "demo", total_steps=20)
    view.say("Ray dashboard: http://127.0.0.1:8265")
    for step in range(1, 15):
        view.show({"step": step, "train/kl": step / 100})
    view.warn("alarm long at step 14: rollout/truncated_ratio is 0.6")
    view.finish()
    view.finish()  # as the end of the context does
    view.say("held-out accuracy: student 0.49 -> 0.90")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Ray dashboard: http://127.0.0.1:8265" in shown
    assert "step 14 of 20, stopped" in shown
    assert "0.0100 -> 0.1400" in shown
    assert "last alarm long at step 14" in shown
    assert shown.rstrip().endswith("held-out accuracy: student 0.49 -> 0.90")  # below the view


def test_a_pipe_gets_plain_lines_even_where_colours_are_forced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal_view("demo", 20) as view:
        view.show({"step": 4, "train/kl": 0.25})
        view.warn("alarm long at step 4: rollout/truncated_ratio is 0.6")
    assert capsys.readouterr().out == "step 4  KL/token 0.2500\nalarm long at step 4: rollout/truncated_ratio is 0.6\n"


def test_a_last_line_that_a_crash_cut_short_does_not_count_and_goes(tmp_path: Path) -> None:
    file = RecordsFile(tmp_path / "m.jsonl")
    file.write({"step": 1})
    with file.path.open("a") as torn:
        torn.write('{"step": 2, "tra')
    assert [record["step"] for record in file.read()] == [1]
    file.drop_from(3)
    file.write({"step": 2})
    assert [record["step"] for record in file.read()] == [1, 2]


@pytest.mark.parametrize("line", ["{", "[]", '{"step": "1"}', '{"other": 1}'])
def test_a_damaged_line_among_others_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "m.jsonl").write_text(f'{line}\n{{"step": 2}}\n')
    with pytest.raises(CheckpointError, match=r"m.jsonl:1: not a record of a step"):
        RecordsFile(tmp_path / "m.jsonl").read()
