"""`python -m benchmarks.cases.wire`: encoding and decoding a scored batch, next to copying the same bytes.

Cases are run in turns, so that noise meets them alike; figures are medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.harness.report import RESULTS, Row, print_rows, row, write_rows
from cluster.contracts.trajectory import GeneratedTrajectory, add_scores, make_generated, ragged
from cluster.contracts.wire import from_wire, to_wire, wire_pieces

REPEATS = 15
ROWS, PROMPT_TOKENS, COMPLETION_TOKENS, TOP_K = 256, 64, 512, 16


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.wire", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today():%Y-%m-%d}-wire.json")
    options = parser.parse_args()
    rows = wire_rows()
    print_rows(rows)
    write_rows(options.output, "python -m benchmarks.cases.wire", rows)


def wire_rows() -> list[Row]:
    """Time encoding and decoding a scored batch against copying the same bytes."""
    batch = make_scored(ROWS, COMPLETION_TOKENS, TOP_K)
    wire = to_wire(batch)
    source = np.frombuffer(wire, dtype=np.uint8)
    target = np.empty_like(source)
    seconds = interleaved(
        {
            "memcpy": lambda: np.copyto(target, source),
            "to_wire": lambda: to_wire(batch),
            "wire_pieces": lambda: wire_pieces(batch),
            "from_wire": lambda: ragged(from_wire(wire, "scored"), "teacher_candidate_logprobs"),
        }
    )
    size = f"{ROWS} x {COMPLETION_TOKENS} tokens, top-{TOP_K}"
    bandwidth = {name: wire.size / value / 1e9 for name, value in seconds.items()}
    return [
        row("wire: memcpy", size, bandwidth["memcpy"], "GB/s"),
        row("wire: encode", size, bandwidth["to_wire"], "GB/s"),
        row("wire: encode / memcpy", size, bandwidth["to_wire"] / bandwidth["memcpy"], "ratio"),
        row("wire: encode in pieces, as actors do", size, 1e6 * seconds["wire_pieces"], "us"),
        row("wire: decode", size, 1e6 * seconds["from_wire"], "us"),
        row("wire: bytes per completion token", size, wire.size / (ROWS * COMPLETION_TOKENS), "bytes"),
    ]


def interleaved(cases: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each case, run in turns."""
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
    mask = np.repeat(np.array([0, 1], dtype=np.uint8), [PROMPT_TOKENS, completion_tokens])
    trajectories = []
    for index in range(rows):
        ids = random.integers(0, 50_000, len(mask), dtype=np.int32)
        logprobs = -random.random(completion_tokens, dtype=np.float32)
        trajectories.append(GeneratedTrajectory(index, index, 0, "main", "", 0, 0, ids, mask, logprobs, "stop", None))
    total = rows * completion_tokens
    scores = {
        "logprobs": -random.random(total, dtype=np.float32),
        "candidate_ids": random.integers(0, 50_000, (total, top_k), dtype=np.int32),
        "candidate_logprobs": -random.random((total, top_k), dtype=np.float32),
    }
    return add_scores(make_generated(trajectories), "teacher", scores)


if __name__ == "__main__":
    main()
