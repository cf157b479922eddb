"""`make bench`: what the loop's stages and its transport do on this machine, as one table and one JSON file.

Rows are {name, size, value, unit}. Timings on a shared machine are noisy: every figure is a median, and what is
compared is measured in the same run, in turns.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.report import RESULTS, Row, describe_machine, print_rows, row
from cluster.commands import start_training
from cluster.contracts.trajectory import (
    GeneratedTrajectory,
    Scores,
    add_scores,
    from_wire,
    make_generated,
    ragged,
    to_wire,
)
from cluster.demo import embedded_config

REPEATS = 15
WARM_UP_STEPS = 2
QUIET = (
    "evaluation.teacher_too=false",
    "evaluation.num_prompts=16",
    "evaluation.every_steps=0",
    "checkpoint.export=false",
)


def main() -> None:
    """Run every benchmark, print the table, and write it where it was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--steps", type=int, default=14, help="optimizer steps of the loop on the embedded pair")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: benchmarks/results/DATE-loop.json")
    options = parser.parse_args()
    rows = [*wire_rows(), *loop_rows(options.steps)]
    print_rows(rows)
    output = options.output or RESULTS / f"{date.today():%Y-%m-%d}-loop.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    described = {"command": "make bench", **describe_machine()}
    output.write_text(json.dumps({"machine": described, "rows": rows}, indent=1) + "\n")
    print(f"written: {output}")


def wire_rows() -> list[Row]:
    """Time encoding and decoding a scored batch against copying the same bytes."""
    batch = make_scored(rows=256, completion_tokens=512, top_k=16)
    wire = to_wire(batch)
    source = np.frombuffer(wire, dtype=np.uint8)
    target = np.empty_like(source)
    seconds = interleaved(
        {
            "memcpy": lambda: np.copyto(target, source),
            "to_wire": lambda: to_wire(batch),
            "from_wire": lambda: ragged(from_wire(wire, "scored"), "teacher_candidate_logprobs"),
        }
    )
    size = "256 x 512 tokens, top-16"
    bandwidth = {name: wire.size / value / 1e9 for name, value in seconds.items()}
    return [
        row("wire: memcpy", size, bandwidth["memcpy"], "GB/s"),
        row("wire: encode", size, bandwidth["to_wire"], "GB/s"),
        row("wire: encode / memcpy", size, bandwidth["to_wire"] / bandwidth["memcpy"], "ratio"),
        row("wire: decode", size, 1e6 * seconds["from_wire"], "us"),
        row("wire: bytes per completion token", size, wire.size / (256 * 512), "bytes"),
    ]


def loop_rows(steps: int) -> list[Row]:
    """Run the embedded pair through the real loop and take the medians of its steps."""
    with tempfile.TemporaryDirectory() as directory:
        overrides = [f"run.directory={directory}", "run.name=bench", f"run.steps={steps}", *QUIET]
        start_training(embedded_config(overrides))
        lines = (Path(directory) / "bench/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines][WARM_UP_STEPS:]
    names = [f"{stage}/tokens_per_second" for stage in ("generate", "score", "learn")]
    names += [f"{stage}/seconds" for stage in ("generate", "score", "learn", "sync", "step")]
    median = {name: statistics.median(record[name] for record in records) for name in names}
    size = f"embedded pair, {len(records)} steps"
    units = {"tokens_per_second": "tokens/s", "seconds": "s"}
    return [
        *(row(f"loop: {name}", size, value, units[name.split("/")[1]]) for name, value in median.items()),
        row(
            "loop: completion tokens / s, whole step",
            size,
            statistics.median(record["step/tokens_per_second"] for record in records),
            "tokens/s",
        ),
    ]


def interleaved(cases: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each case, run in turns so that noise meets them alike."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(REPEATS):
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def make_scored(rows: int, completion_tokens: int, top_k: int) -> pa.RecordBatch:
    """Build a scored batch of random values."""
    random = np.random.default_rng(0)
    mask = np.repeat(np.array([0, 1], dtype=np.uint8), [64, completion_tokens])
    trajectories = []
    for index in range(rows):
        ids = random.integers(0, 50_000, len(mask), dtype=np.int32)
        logprobs = -random.random(completion_tokens, dtype=np.float32)
        trajectories.append(GeneratedTrajectory(index, index, 0, "main", "", 0, 0, ids, mask, logprobs, "stop", None))
    total = rows * completion_tokens
    scores = Scores(
        -random.random(total, dtype=np.float32),
        random.integers(0, 50_000, (total, top_k), dtype=np.int32),
        -random.random((total, top_k), dtype=np.float32),
    )
    return add_scores(make_generated(trajectories), "teacher", scores)


if __name__ == "__main__":
    main()
