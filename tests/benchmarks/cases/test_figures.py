"""Figures are drawn from result files, small enough to be committed."""

from pathlib import Path

import pytest

from benchmarks.cases.figures import draw_bars, draw_soak, draw_staleness, newest
from benchmarks.harness.report import row

MAX_BYTES = 100_000
PNG = b"\x89PNG"


def is_small_png(path: Path) -> bool:
    content = path.read_bytes()
    return content.startswith(PNG) and len(content) < MAX_BYTES


def test_a_study_of_all_cells_makes_a_small_figure(tmp_path: Path) -> None:
    runs = [
        {
            "cell": {"objective": objective, "max_staleness": bound, "seed": seed},
            "mean_staleness": 0.9 * bound,
            "last_accuracy": 0.9 - 0.01 * bound + 0.005 * seed,
        }
        for objective in ("forward", "frozen")
        for bound in (0, 1, 2, 4)
        for seed in range(3)
    ]
    titles = {"forward": "forward KL", "frozen": "reverse KL, frozen"}
    draw_staleness({"titles": titles, "runs": runs}, tmp_path / "staleness.png")
    assert is_small_png(tmp_path / "staleness.png")


def test_a_long_soak_makes_a_small_figure(tmp_path: Path) -> None:
    seconds = list(range(0, 7200, 10))
    heaps = {name: [10**8 + 10**5 * (second % 7) for second in seconds] for name in ("driver_bytes", "actor_bytes")}
    series = {"seconds": seconds, **heaps, "ray_bytes": heaps["driver_bytes"], "store_bytes": heaps["actor_bytes"]}
    draw_soak({"series": series}, tmp_path / "soak.png")
    assert is_small_png(tmp_path / "soak.png")


def test_bars_are_grouped_by_size_even_where_one_is_missing(tmp_path: Path) -> None:
    rows = [row("ours", "tiny pair", 4000, "tokens/s"), row("TRL", "tiny pair", 900, "tokens/s")]
    draw_bars([*rows, row("ours", "SmolLM2", 90, "tokens/s")], tmp_path / "bars.png")
    assert is_small_png(tmp_path / "bars.png")


def test_bars_of_two_units_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too many values"):
        draw_bars([row("ours", "a", 1, "tokens/s"), row("ours", "a", 1, "s")], tmp_path / "bars.png")


def test_the_newest_file_is_the_one_with_the_latest_date(tmp_path: Path) -> None:
    for name in ("2026-11-30-soak.json", "2026-12-01-soak.json", "2026-12-02-loop.json"):
        (tmp_path / name).touch()
    found = newest(tmp_path, "*-soak.json")
    assert found is not None
    assert found.name == "2026-12-01-soak.json"
    assert newest(tmp_path, "*-staleness.json") is None
