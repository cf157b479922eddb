"""Measures a scored batch from one Ray actor to another, and the cost of each signal, for `weight_sync`."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from benchmarks.cases.wire import make_scored
from benchmarks.harness.report import Row, at_least, row
from cluster.actors.object_store import STORE_ENVIRONMENT, pack
from cluster.contracts.batches import BatchHandle
from cluster.contracts.pieces import Pieces
from cluster.contracts.signals import Scores
from cluster.contracts.trajectory import GeneratedTrajectory, add_scores, make_generated, ragged
from cluster.contracts.wire import from_wire, to_wire

ROWS, COMPLETION_TOKENS, TOP_K = 800, 512, 16  # about 64 MB
MIN_BANDWIDTH = 0.5  # of memcpy
FREEING_SECONDS = 0.2  # in which the store frees the last object, whose memory the next takes, as in a run
TOLERANCE = 0.02  # of the bytes that a signal should take
SIGNAL_TOKENS, SIGNAL_TOP_K, SIGNAL_WIDTH = 4_096, 64, 1_024


class Scorer:
    """Makes one scored batch and hands it out again and again, as a teacher worker returns it."""

    def __init__(self) -> None:
        self._batch = make_scored(ROWS, COMPLETION_TOKENS, TOP_K)

    def score(self) -> tuple[Pieces, BatchHandle]:
        """Return the batch's bytes and handle."""
        return pack(self._batch, {})


class Learner:
    """Reads batches as a learner rank does."""

    def read(self, reference: Sequence[Any]) -> tuple[int, float]:
        """Fetch the batch, read every byte of its columns, and return its size and the seconds that reading took."""
        wire = ray.get(reference[0])
        started = time.perf_counter()
        touch(from_wire(wire, "scored"))
        return len(wire), time.perf_counter() - started


def touch(batch: pa.RecordBatch) -> None:
    """Read every value of the list columns."""
    for field in batch.schema:
        if pa.types.is_list(field.type):
            values = ragged(batch, field.name).values
            words = values.reshape(-1).view(f"u{values.itemsize}")  # numpy looks at bytes four times slower
            words.max(initial=0)


def hand_off_rows(repeats: int) -> list[Row]:
    """Time the way of a batch from actor to actor, and copying as many bytes, in turns."""
    options = {"num_cpus": 1, "runtime_env": {"env_vars": dict(STORE_ENVIRONMENT)}}
    scorer = ray.remote(Scorer).options(**options).remote()
    learner = ray.remote(Learner).options(**options).remote()
    seconds: dict[str, list[float]] = {"whole": [], "read": [], "memcpy": []}
    source, target = np.empty(0, np.uint8), np.empty(0, np.uint8)
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        wire, _ = scorer.score.options(num_returns=2).remote()
        num_bytes, reading = ray.get(learner.read.remote([wire]))
        whole = time.perf_counter() - started
        if not repeat:  # warms up
            source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
            continue
        seconds["whole"].append(whole)
        seconds["read"].append(reading)
        started = time.perf_counter()
        np.copyto(target, source)
        seconds["memcpy"].append(time.perf_counter() - started)
        del wire
        time.sleep(FREEING_SECONDS)
    for actor in (scorer, learner):
        ray.kill(actor)
    size = f"{source.size / 1e6:.0f} MB, top-{TOP_K}"
    bandwidth = {name: source.size / statistics.median(values) / 1e9 for name, values in seconds.items()}
    return [
        row("hand-off: memcpy", size, bandwidth["memcpy"], "GB/s"),
        row("hand-off: pack, store, get, read", size, bandwidth["whole"], "GB/s"),
        row("hand-off: of which reading every column", size, bandwidth["read"], "GB/s"),
        at_least(row("hand-off / memcpy", size, bandwidth["whole"] / bandwidth["memcpy"], "ratio"), MIN_BANDWIDTH),
    ]


def signal_rows() -> list[Row]:
    """Compare what each teacher signal adds to a batch with what its values take."""
    size = f"{SIGNAL_TOKENS} completion tokens"
    expected = {"sampled": 4.0, f"top-{SIGNAL_TOP_K}": 8.0 * SIGNAL_TOP_K, "hidden": 2.0 * SIGNAL_WIDTH}
    rows = []
    for name, found in bytes_per_token().items():
        bar = f"{expected[name]:g} +- {TOLERANCE:.0%}"
        met = abs(found / expected[name] - 1) <= TOLERANCE
        rows.append({**row(f"bytes per token, {name}", size, found, "bytes"), "bar": bar, "met": met})
    return rows


def bytes_per_token() -> dict[str, float]:
    """Return what each signal adds to the bytes of a batch, per completion token."""
    num = SIGNAL_TOKENS
    logprobs = np.full(num, -1.0, np.float32)
    ids = np.zeros((num, SIGNAL_TOP_K), np.int32)
    hidden = np.zeros((num, SIGNAL_WIDTH), np.uint16)
    plain = _wire_bytes(None)
    sampled_scores = {"logprobs": logprobs}
    sampled = _wire_bytes(sampled_scores)
    top_k = _wire_bytes(
        {**sampled_scores, "candidate_ids": ids, "candidate_logprobs": np.full(ids.shape, -1.0, np.float32)}
    )
    with_hidden = _wire_bytes({**sampled_scores, "hidden": hidden})
    return {
        "sampled": (sampled - plain) / num,
        f"top-{SIGNAL_TOP_K}": (top_k - sampled) / num,
        "hidden": (with_hidden - sampled) / num,
    }


def _wire_bytes(scores: Scores | None) -> int:
    ids, mask = np.zeros(SIGNAL_TOKENS + 1, np.int32), np.ones(SIGNAL_TOKENS + 1, np.uint8)
    mask[0] = 0
    logprobs = np.full(SIGNAL_TOKENS, -1.0, np.float32)
    batch = make_generated([GeneratedTrajectory(0, 0, 0, "main", "", 0, 0, ids, mask, logprobs, "stop", None)])
    return int(to_wire(batch if scores is None else add_scores(batch, "teacher", scores)).size)
