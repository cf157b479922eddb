import json
import math
from pathlib import Path

import pytest

from cluster.metric_sinks import MetricsFile, PlainView


def test_each_step_is_one_json_object_and_nan_is_null(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "m.jsonl").write({"step": 3, "train/kl": math.nan})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 3, "train/kl": None}


def test_a_resumed_run_forgets_the_steps_that_it_does_again(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    for step in range(5):
        file.write({"step": step})
    file.drop_from(3)
    file.write({"step": 3})
    assert [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [0, 1, 2, 3]


def test_a_pipe_gets_one_plain_line_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    PlainView().show({"step": 4, "train/kl": 0.25, "unknown": 1.0, "held_out/accuracy": math.nan})
    assert capsys.readouterr().out == "step 4  KL/token 0.2500\n"
