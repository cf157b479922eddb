"""What is run first on a new GPU: in which order, in which time, and what is left when it is cut."""

import json
from pathlib import Path

import pytest

from benchmarks import first_minutes
from benchmarks.first_minutes import ALL_SECONDS, STEPS, Step, main
from benchmarks.harness.model_pairs import ROOT
from tests.gpu.conftest import NEEDS


def rows_in(folder: Path) -> list[dict[str, object]]:
    return json.loads((folder / "summary.json").read_text())["rows"]


def test_all_of_it_takes_less_than_eight_minutes_and_what_needs_torch_alone_comes_first() -> None:
    assert sum(step.seconds for step in STEPS) <= ALL_SECONDS < 8 * 60
    assert [len(step.needs) for step in STEPS] == sorted(len(step.needs) for step in STEPS)
    files = {Path(part).name for step in STEPS for part in step.command if part.endswith(".py")}
    assert files < set(NEEDS)


def test_the_documentation_has_the_same_steps() -> None:
    text = (ROOT / "docs/gpu.md").read_text()
    for step in STEPS:
        assert f"| `{step.name}` |" in text
        assert f"| {step.seconds:.0f} |" in text


def test_a_step_that_fails_or_takes_too_long_leaves_the_others_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = (
        Step("good", ("this",), 10),
        Step("bad", ("no_such_module",), 10),
        Step("absent", ("this",), 10, ("no_such_package",)),
        Step("long", ("timeit", "-s", "import time", "time.sleep(600)"), 0.5),
    )
    monkeypatch.setattr(first_minutes, "STEPS", steps)
    assert main([str(tmp_path)]) == 1
    good, bad, absent, long = rows_in(tmp_path)
    assert (good["met"], bad["met"], long["met"]) == (True, False, False)
    assert absent["size"] == "left out: no no_such_package"
    assert "No module named no_such_module" in (tmp_path / "bad.txt").read_text()
    assert "ended after 1 s" in (tmp_path / "long.txt").read_text()
    assert main([str(tmp_path), "--seconds", "1"]) == 0
    assert {found["size"] for found in rows_in(tmp_path)[:2]} == {"left out: no time"}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_the_first_steps_run_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_minutes, "STEPS", [step for step in STEPS if not step.needs])
    assert main([str(tmp_path), "--dry-run", "--seconds", "1100"]) == 0
    assert [found["name"] for found in rows_in(tmp_path)] == ["kernel-tests", "losses", "first", "kernels"]
    assert all(found["met"] for found in rows_in(tmp_path))
    kernels = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert any(found["name"] == "exact reverse KL, per product" for found in kernels)
