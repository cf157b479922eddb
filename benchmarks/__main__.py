"""`make bench`: everything that is measured on one machine, as one table and one JSON file.

Each part is a program of its own (`python -m benchmarks.cases.PART`). They run one after the other, since they share
the cores. `--parts` runs some of them: the rows of the others stay as `benchmarks/results/latest.json` has them, if
that was measured on a machine like this one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from benchmarks.harness.model_pairs import ROOT, missing_models
from benchmarks.harness.report import RESULTS, Row, describe_machine, print_rows
from benchmarks.harness.suite import PARTS, Part, labelled, merge_rows, same_machine

COMMAND = "python -m benchmarks"


def main() -> int:
    """Run the parts, print the table and write it; exit code 1 when a part failed."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of latest.json and DATE-bench.json")
    options = parser.parse_args()
    lacking = {name: missing_models(PARTS[name].pair) for name in options.parts}
    measured = {name: run_part(name, PARTS[name]) for name in options.parts if not lacking[name]}
    write_table(options.results, {name: rows for name, rows in measured.items() if rows is not None})
    for name, sentence in lacking.items():
        if sentence:
            print(f"not run: {name}: {sentence}")
    failed = [name for name, rows in measured.items() if rows is None]
    for name in failed:
        print(f"FAILED: {name}: {' '.join(command_of(PARTS[name]))}")
    return 1 if failed else 0


def run_part(name: str, part: Part) -> list[Row] | None:
    """Run one part and return its rows; None when it wrote none, after what it printed says why.

    A part's exit code does not count: it can also say that a bar was missed, and the rows say that themselves.
    """
    print(f"== {name}", flush=True)
    today, load_average = f"{date.today():%Y-%m-%d}", os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        # Threads that spin while they wait would take the cores from other processes of the same part.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run([*command_of(part), "--output", str(output)], cwd=ROOT, env=environment, check=False)
        if not output.exists():
            return None
        return labelled(name, json.loads(output.read_text())["rows"], today, load_average)


def command_of(part: Part) -> list[str]:
    """Return the program that measures a part."""
    return [sys.executable, "-m", f"benchmarks.cases.{part.module}", *part.arguments]


def write_table(results: Path, measured: dict[str, list[Row]]) -> None:
    """Merge what was measured into the latest table, print it, and write it under today's date and as the latest."""
    latest, machine = results / "latest.json", {"command": COMMAND, **describe_machine()}
    kept: list[Row] = []
    if latest.exists():
        earlier = json.loads(latest.read_text())
        if same_machine(earlier["machine"], machine):
            kept = earlier["rows"]
        else:
            print(f"{latest}: measured on another machine or with other versions; the table begins anew")
    rows = merge_rows(kept, measured)
    print_rows(rows)
    text = json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n"
    results.mkdir(parents=True, exist_ok=True)
    for path in (results / f"{date.today():%Y-%m-%d}-bench.json", latest):
        path.write_text(text)
        print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
