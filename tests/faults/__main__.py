"""Applies each seeded fault to a copy of the tree, and prints which test of `make test` catches it.

`python -m tests.faults [NAME...] [--jobs N] [--output FILE]`. Mutation tools make faults by rules of syntax; ours are
chosen by hand, so a table of texts and this file are all that it takes. Tests that are not slow start no engine: they
run in forks of one process, in a second or two.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from benchmarks.harness.report import describe_machine
from tests.faults.fault import Fault
from tests.faults.forked import run_in_fork
from tests.faults.table import AREAS, FAULTS, GROUPS

ROOT = Path(__file__).parents[2]
# A fault that only keeps a file from being imported is no fault that an expert would make.
BROKEN = ("ImportError", "ModuleNotFoundError", "SyntaxError", "NameError")
LIMIT_SECONDS = 900


@dataclass(frozen=True)
class Outcome:
    """Says what the tests of one tree did."""

    caught_by: str | None  # id of the first test that failed; None: none did
    remark: str  # why a failure does not count, or how pytest ended
    seconds: float


def main() -> int:
    """Check the tests on the tree as it is, then every fault; return 1 if one is not caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults or areas of tests/faults/table.py; none: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="faults at a time")
    parser.add_argument("--output", type=Path, help="file for the results as JSON")
    arguments = parser.parse_args()
    names = [name for group in arguments.names for name in GROUPS.get(group, (group,))]
    unknown = set(names) - {fault.name for fault in FAULTS} - set(AREAS)
    if unknown:
        parser.error(f"there is no fault or area called {', '.join(sorted(unknown))}")
    named = {*names, *(fault.name for area in names for fault in AREAS.get(area, ()))}
    faults = [fault for fault in FAULTS if not named or fault.name in named]
    started = perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        whole = Path(folder) / "whole"
        copy_tree(whole)
        tests = sorted({test for fault in faults for test in fault.tests})
        # This run also compiles what the copies below then share.
        clean = run_tests(whole, tests, "-n", str(arguments.jobs))
        if clean.remark:
            print(f"the tests fail without any fault: {clean.caught_by or clean.remark}")
            return 1
        print(f"{len(tests)} test files and tests pass without a fault, {clean.seconds:.0f} s", flush=True)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            outcomes = list(pool.map(lambda fault: try_fault(fault, whole), faults))
    num_caught = sum(outcome.caught_by is not None for outcome in outcomes)
    seconds = perf_counter() - started
    print(f"{num_caught} of {len(faults)} faults caught, {seconds:.0f} s")
    if arguments.output:
        write_results(arguments.output, faults, outcomes, seconds)
    return 0 if num_caught == len(faults) else 1


def copy_tree(target: Path) -> None:
    """Copy what git knows of the tree, and what it would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def try_fault(fault: Fault, whole: Path) -> Outcome:
    """Run the fault's tests on a copy that has it, and print what became of it."""
    tree = whole.parent / fault.name
    shutil.copytree(whole, tree, copy_function=os.link)
    path = tree / fault.path
    text = fault.applied_to(path.read_text(encoding="utf-8"))
    path.unlink()  # it is a link to the file without the fault
    path.write_text(text, encoding="utf-8")
    is_forked = not any(may_be_slow(whole, test) for test in fault.tests)
    outcome = run_tests(tree, fault.tests, "-x", "-n0", is_forked=is_forked)
    shutil.rmtree(tree)
    caught = (
        f"caught by {outcome.caught_by}" if outcome.caught_by else f"NOT CAUGHT: {outcome.remark or 'its tests pass'}"
    )
    print(f"{fault.name:<44} {outcome.seconds:5.0f} s  {caught}", flush=True)
    return outcome


def may_be_slow(tree: Path, test: str) -> bool:
    """Return whether the file that a test is in has slow tests; of a folder: whether any of its files has."""
    path = tree / test.partition("::")[0]
    return any(
        "mark.slow" in file.read_text(encoding="utf-8") for file in [path, *path.rglob("*.py")] if file.is_file()
    )


def run_tests(tree: Path, tests: Sequence[str], *options: str, is_forked: bool = False) -> Outcome:
    """Run tests of a tree, as far as `make test` runs them."""
    report = tree.parent / f"{tree.name}.xml"  # outside, for the trees share their files
    arguments = ["-q", "-m", "not exhaustive", "-p", "no:cacheprovider"]
    arguments += ["-o", "junit_family=xunit1", f"--junitxml={report}", *options, *tests]
    log, started = tree.parent / f"{tree.name}.log", perf_counter()
    code = run_in_fork(tree, arguments, log, LIMIT_SECONDS) if is_forked else run_apart(tree, arguments, log)
    seconds = perf_counter() - started
    if code is None:
        return Outcome(None, f"the tests took more than {LIMIT_SECONDS} s", seconds)
    if not code:
        return Outcome(None, "", seconds)
    test, message = first_failure(report)
    if test and code == 1 and not message.startswith(BROKEN):
        return Outcome(test, "a test failed", seconds)
    last_line = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    return Outcome(None, f"pytest ended with {code}: {message or last_line}", seconds)


def run_apart(tree: Path, arguments: Sequence[str], log: Path) -> int | None:
    """Run pytest in a process of its own, and return its exit code; None: it took too long."""
    command, environment = [sys.executable, "-m", "pytest", *arguments], {**os.environ, "PYTHONPATH": str(tree)}
    with log.open("w", encoding="utf-8") as output:
        try:
            return subprocess.run(
                command, cwd=tree, env=environment, stdout=output, stderr=output, timeout=LIMIT_SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            return None


def first_failure(report: Path) -> tuple[str, str]:
    """Return the id of the first test that failed, and its error; two empty texts if none did."""
    cases = ElementTree.parse(report).iter("testcase") if report.is_file() else ()
    for case in cases:
        for fault in [*case.findall("failure"), *case.findall("error")]:
            return f"{case.get('file')}::{case.get('name')}", fault.get("message", "").partition("\n")[0]
    return "", ""


def write_results(output: Path, faults: Sequence[Fault], outcomes: Sequence[Outcome], seconds: float) -> None:
    """Write the table of results, and what it belongs to."""
    rows = [{"name": fault.name, **asdict(outcome)} for fault, outcome in zip(faults, outcomes, strict=True)]
    command = "python -m tests.faults " + " ".join(sys.argv[1:])
    machine = {"command": command.strip(), "seconds": round(seconds), **describe_machine()}
    rows = [{**row, "seconds": round(row["seconds"], 1)} for row in rows]
    output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
