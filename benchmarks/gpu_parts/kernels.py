"""What the card can do, and what divergences make of it; no engine, no Ray."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.cases.objective import CASES, Sizes, interleaved, memory_rows, time_rows
from benchmarks.gpu_parts.shapes import Scale
from benchmarks.harness.report import Row, row

COPY_BYTES = {"cuda": 1 << 32, "cpu": 1 << 24}
MATMUL_WIDTH = {"cuda": 8192, "cpu": 256}
TIMED_TOKENS = {"cuda": 8192, "cpu": 64}
MEMORY_TOKENS = {"cuda": (2048, 8192, 32768), "cpu": (32, 64)}
CHUNK_TOKENS = {"cuda": 1024, "cpu": 16}


def rows(scale: Scale, _folder: Path, _seconds: float) -> Iterator[Row]:
    """Time copies, products and objectives."""
    found = card_rows(scale)
    yield from found
    kind = scale.device.type
    sizes = Sizes(
        scale.device,
        scale.dtype,
        vocabulary=scale.student.vocabulary,
        width=scale.student.hidden,
        timed_tokens=TIMED_TOKENS[kind],
        memory_tokens=MEMORY_TOKENS[kind],
        memory_chunk_tokens=CHUNK_TOKENS[kind],
    )
    timed = time_rows(sizes, scale.repeats)
    yield from timed
    yield from share_rows(timed, sizes, tflops=found[1]["value"])
    yield from memory_rows(sizes)


def card_rows(scale: Scale) -> list[Row]:
    """Return the rates of a copy, bytes read and written, and of a product of large matrices."""
    kind, device = scale.device.type, scale.device
    source = torch.ones(COPY_BYTES[kind], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    width = MATMUL_WIDTH[kind]
    # Random numbers: a card computes with zeros faster than with anything else.
    left, right = (torch.randn(width, width, device=device).to(scale.dtype) for _ in range(2))
    seconds = interleaved(
        {"copy": lambda: target.copy_(source), "matmul": lambda: left @ right},  # type: ignore[dict-item]
        device,
        repeats=5 * scale.repeats,
    )
    moved, multiplied = 2 * source.numel() / seconds["copy"], 2 * width**3 / seconds["matmul"]
    return [
        row("card: copy, read and written", f"{source.numel() / 1e9:.1f} GB", moved / 1e12, "TB/s"),
        row("card: matmul", f"{width} cubed, {scale.dtype_name}", multiplied / 1e12, "TFLOP/s"),
    ]


def share_rows(timed: Sequence[Row], sizes: Sizes, tflops: float) -> Iterator[Row]:
    """Say how much of the card's matmul rate each objective's products reach, all else included in the time."""
    products = {case.name: case.products for case in CASES} | {"cross-entropy, whole": 3, "cross-entropy, in chunks": 3}
    flops = 2 * sizes.timed_tokens * sizes.width * sizes.vocabulary
    for found in timed:
        if found["name"] in products:
            rate = products[found["name"]] * flops / found["value"] / 1e12
            yield row(f"{found['name']}, of the matmul rate", found["size"], rate / tflops, "ratio")
