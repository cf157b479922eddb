"""Teachers alone: our scores against vLLM's own and against reading alone."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cases.teacher_scoring import Plan, Setting, measure
from benchmarks.gpu_parts.shapes import Scale, head_folder
from benchmarks.harness.report import Row
from cluster.config.stages import EngineConfig

TOP_KS = {"cuda": (1, 16, 64), "cpu": (1, 64)}
GPU_MEMORY_FRACTION = 0.35  # of each of two engines; LM head and logits live in the rest
BATCHED_TOKENS = 16_384


def rows(scale: Scale, folder: Path, seconds: float) -> Iterator[Row]:
    """Measure each teacher with two engines of its own."""
    # Compiling pays for decoding, not for reading thousands of tokens at once.
    engine = EngineConfig(
        gpu_memory_fraction=GPU_MEMORY_FRACTION,
        kv_cache_gib=0.1,
        enforce_eager=True,
        max_batched_tokens=BATCHED_TOKENS if scale.device.type == "cuda" else 512,
        extra={"load_format": "dummy"},
    )
    share = seconds / len(scale.scored_teachers) / 2  # the engines' start takes the other half
    threads = 1 if scale.device.type == "cpu" else None
    plan = Plan(TOP_KS[scale.device.type], scale.repeats, threads, engine, share)
    for shape in scale.scored_teachers:
        model = str(head_folder(scale, shape, folder))
        longest = scale.prompt_tokens + scale.max_tokens
        setting = Setting(
            shape.name,
            model,
            scale.dtype_name,
            scale.num_scored,
            scale.prompt_tokens,
            longest,
        )
        yield from asyncio.run(measure(setting, plan))
