"""All stages on one card: one after the other, strictly on-policy streaming, and one step ahead."""

import importlib.util
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.cases.stages import STAGES, Alone, Bench, Together
from benchmarks.gpu_parts.shapes import Scale, model_folder, write_prompts
from benchmarks.harness.report import Row, at_least, at_most, row
from cluster.config.run_config import Config
from cluster.config.run_file import parse_run_config
from cluster.nodes.ray_session import ray_session
from cluster.placement.placement import cluster_nodes, plan_placement
from cluster.run.inputs import load_inputs
from cluster.run.pools import start_pipeline

LEAST_OF_LIMIT = 0.9
MAX_SYNC_SECONDS = 0.3
# The learner multiplies by the LM head into float32. vLLM 0.24 rounds its logits to bfloat16, which alone is 0.019 nats
# per token with random weights like these (`tests/benchmarks/test_gpu.py`); other kernels add 0.005 to 0.015.
MAX_GAP_NATS = 0.03
ROUNDS = {"cuda": 2, "cpu": 1}
AHEAD_STEPS = {"cuda": 4, "cpu": 3}  # the first has nobody to run ahead of, the last nobody that runs ahead
# Parts of the card's memory, and the caches of keys and values in them; a tenth is for teacher's LM head and processes.
ROLLOUT_SHARE = {"gpu_memory_fraction": 0.25, "kv_cache_gib": 20.0}
TEACHER_SHARE = {"gpu_memory_fraction": 0.2, "kv_cache_gib": 8.0}
LEARNER_FRACTION = 0.45
DRY_CACHE = {"kv_cache_gib": 0.1}


def rows(scale: Scale, folder: Path, seconds: float) -> Iterator[Row]:
    """Start the pools and do the same kind of step in each way, in turns."""
    began = time.perf_counter()
    config = loop_config(scale, folder)
    inputs = load_inputs(config)
    with ray_session(config), start_pipeline(config, inputs, plan_placement(config, cluster_nodes())) as pipeline:
        bench = Bench(config, inputs, pipeline)
        started_seconds = time.perf_counter() - began
        yield row("loop: start of all pools", describe(scale), started_seconds, "s")
        yield from measured_rows(scale, bench, began + seconds)


def measured_rows(scale: Scale, bench: Bench, deadline: float) -> Iterator[Row]:
    """Return the loop's table; rounds that would begin after half of the time are left out."""
    kind, size = scale.device.type, describe(scale)
    half = (time.perf_counter() + deadline) / 2
    bench.alone(0)
    bench.together(0)
    alone: list[Alone] = []
    together: list[Together] = []
    while len(alone) < ROUNDS[kind] and (not alone or time.perf_counter() < half):
        by_itself, as_a_loop = bench.both(1 + len(alone))
        alone.append(by_itself)
        together.append(as_a_loop)
    yield from stage_rows(alone, size)
    yield from streaming_rows(alone, together, size)
    yield from sampler_rows(together, size)
    first = 1 + len(together)
    ahead = bench.running(range(first, first + AHEAD_STEPS[kind]), max_staleness=1)[1:-1]
    yield row("loop: staleness 1", size, rate_of(ahead), "tokens/s")
    yield row("loop: staleness 1 / strict streaming", size, rate_of(ahead) / rate_of(together), "ratio")


def stage_rows(alone: Sequence[Alone], size: str) -> Iterator[Row]:
    """Return each stage by itself."""
    for stage in STAGES[:-1]:
        rate = statistics.median(step.completion_tokens / step.stages[stage].seconds for step in alone)
        yield row(f"alone: {stage}", size, rate, "tokens/s")
    sync = statistics.median(step.stages["sync"].seconds for step in alone)
    yield at_most(row("alone: sync", size, sync, "s"), MAX_SYNC_SECONDS)


def streaming_rows(alone: Sequence[Alone], together: Sequence[Together], size: str) -> Iterator[Row]:
    """Hold strict streaming against the sum of the stages, which is the limit where they share one card.

    Per completion token: two steps write about, but not exactly, equally much.
    """
    tokens = sum(step.completion_tokens for step in alone)
    needed = sum(took.seconds for step in alone for took in step.stages.values()) / tokens
    slowest = max(sum(step.stages[stage].seconds for step in alone) for stage in STAGES) / tokens
    streaming = rate_of(together)
    yield row("loop: sequential", size, 1 / needed, "tokens/s")
    yield row("loop: strict streaming", size, streaming, "tokens/s")
    yield row("loop: strict streaming / slowest stage alone", size, streaming * slowest, "ratio")
    yield at_least(
        row("loop: strict streaming / sum of the stages alone", size, streaming * needed, "ratio"), LEAST_OF_LIMIT
    )


def sampler_rows(together: Sequence[Together], size: str) -> Iterator[Row]:
    """Return how long completions are, and how far the learner's log-probabilities are from the sampler's."""

    def median(name: str) -> float:
        return statistics.median(step.record[name] for step in together)

    yield row("completion length, mean", size, median("rollout/completion_length"), "tokens")
    yield row("completion length, longest of a step", size, median("rollout/completion_length_max"), "tokens")
    gap, largest = median("train/sampler_learner_gap"), median("train/sampler_learner_gap_max")
    ratio = median("train/importance_p99")
    yield at_most(row("sampler against learner: mean difference", size, gap, "nats"), MAX_GAP_NATS)
    yield row("sampler against learner: largest difference", size, largest, "nats")
    yield row("importance ratio, 99th percentile", size, ratio, "ratio")


def rate_of(steps: Sequence[Together]) -> float:
    """Return completion tokens per second."""
    return sum(step.completion_tokens for step in steps) / sum(step.spent.seconds for step in steps)


def describe(scale: Scale) -> str:
    """Say what is trained."""
    count = scale.num_prompts * scale.samples_per_prompt
    return f"{scale.student.name} from {scale.teacher.name}, {count} x at most {scale.max_tokens} tokens"


def loop_config(scale: Scale, folder: Path) -> Config:
    """Return the run that is measured; without DeepSpeed, the learner is plain torch."""
    on_card = scale.device.type == "cuda"
    has_deepspeed = on_card and importlib.util.find_spec("deepspeed") is not None
    engine: dict[str, object] = {
        "dtype": scale.dtype_name,
        "max_concurrent_sequences": 256 if on_card else 8,
        "max_batched_tokens": 16_384 if on_card else 512,
    }
    sections: dict[str, dict[str, object]] = {
        "student": {"model": str(model_folder(scale, scale.student, folder))},
        "prompts": {
            "train": str(write_prompts(scale, folder)),
            "template": "raw",
            "prompts_per_step": scale.num_prompts,
        },
        "rollout": {"samples_per_prompt": scale.samples_per_prompt, "max_completion_tokens": scale.max_tokens},
        "rollout.engine": engine | (ROLLOUT_SHARE if on_card else DRY_CACHE) | {"enforce_eager": not on_card},
        "teachers.main": {"model": str(model_folder(scale, scale.teacher, folder))},
        "teachers.main.engine": engine | (TEACHER_SHARE if on_card else DRY_CACHE) | {"enforce_eager": True},
        "learner": {
            "dtype": scale.dtype_name,
            "zero_stage": 2 if has_deepspeed else 0,
            "micro_batch_tokens": scale.micro_batch_tokens,
            **({"gpu_memory_fraction": LEARNER_FRACTION} if on_card else {}),
        },
        "weight_sync": {"transport": "ipc" if on_card else "object_store"},
        "ray": {"dashboard": False, **({"share_gpu": True} if on_card else {})},
    }
    return parse_run_config("\n".join(_section(name, fields) for name, fields in sections.items()), [])


def _section(name: str, fields: dict[str, object]) -> str:
    """Return a TOML table; booleans are spelt as TOML does, and everything else as Python does."""
    lines = [
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}" for key, value in fields.items()
    ]
    return "\n".join([f"[{name}]", *lines])
