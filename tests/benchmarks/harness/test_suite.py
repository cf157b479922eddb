import json
from pathlib import Path

import pytest

from benchmarks.__main__ import run_part, write_table
from benchmarks.harness.report import Row, at_least, describe_machine, row
from benchmarks.harness.suite import PARTS, Part, labelled, merge_rows


def rows_of(part: str, *values: float) -> list[Row]:
    return labelled(part, [row("speed", "", value, "1/s") for value in values], "2026-01-01", 0.5)


def test_a_part_run_again_replaces_all_its_rows_and_no_others() -> None:
    kept = [*rows_of("wire", 1, 2), *rows_of("objective", 3)]
    merged = merge_rows(kept, {"wire": rows_of("wire", 9)})
    assert [(found["part"], found["value"]) for found in merged] == [("wire", 9), ("objective", 3)]


def test_the_table_has_the_parts_order_whenever_they_were_measured() -> None:
    merged = merge_rows(rows_of("objective", 3), {"wire": rows_of("wire", 1)})
    assert [found["part"] for found in merged] == ["wire", "objective"]


def test_a_second_sitting_keeps_the_first_ones_rows_with_their_date(tmp_path: Path) -> None:
    write_table(tmp_path, {"wire": rows_of("wire", 1)})
    write_table(tmp_path, {"objective": rows_of("objective", 3)})
    latest = json.loads((tmp_path / "latest.json").read_text())
    assert [(found["value"], found["date"], found["load_average"]) for found in latest["rows"]] == [
        (1, "2026-01-01", 0.5),
        (3, "2026-01-01", 0.5),
    ]
    (dated,) = tmp_path.glob("*-bench.json")
    assert json.loads(dated.read_text()) == latest


def test_rows_of_another_machine_are_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {**describe_machine(), "cpus": 10_000}
    (tmp_path / "latest.json").write_text(json.dumps({"machine": other, "rows": rows_of("wire", 1)}))
    write_table(tmp_path, {"objective": rows_of("objective", 3)})
    rows = json.loads((tmp_path / "latest.json").read_text())["rows"]
    assert [found["part"] for found in rows] == ["objective"]
    assert "another machine" in capsys.readouterr().out


def test_a_part_that_writes_no_rows_has_failed() -> None:
    assert run_part("none", Part("there_is_no_such_benchmark")) is None


def test_a_part_is_measured_by_its_own_program() -> None:
    rows = run_part("wire", PARTS["wire"])
    assert rows is not None
    assert {found["part"] for found in rows} == {"wire"}
    ratio = next(found["value"] for found in rows if found["name"] == "wire: encode / memcpy")
    assert 0 < ratio < 10


@pytest.mark.parametrize(("value", "met"), [(1.99, False), (2.0, True)])
def test_a_bar_is_met_from_its_value_on(value: float, met: bool) -> None:
    assert at_least(row("speed-up", "", value, "ratio"), 2) == {
        "name": "speed-up",
        "size": "",
        "value": value,
        "unit": "ratio",
        "bar": ">= 2",
        "met": met,
    }
