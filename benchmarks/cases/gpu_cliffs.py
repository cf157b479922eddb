"""Measures on a CPU what was built for GPUs: draws, top-k, micro-batches made ahead, compiled layers, kept caches.

`python -m benchmarks.cases.gpu_cliffs [PART...] [--output FILE]`: before and after in turns, in one process; values are
medians, and a ratio is the median of the turns' ratios, before over after.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.model_pairs import ROOT
from benchmarks.harness.report import Row, at_least, print_rows, row, write_rows
from cluster.config.objective import ObjectiveConfig
from cluster.config.presets import expand_preset
from cluster.config.stages import LearnerConfig
from cluster.models.token_scores import largest_logits
from cluster.vllm.compat import scheduler_name
from cluster.vllm.engine import KEEPING_SCHEDULER
from learner.batching.micro_batch import Trajectory, build_micro_batch
from learner.engines.torch import ReferenceEngine
from learner.loss.objective import Objective
from learner.model.student import Student
from learner.train_step import accumulate, prefetched
from rollout_workers.candidates.sampled import sample

COMMAND = "python -m benchmarks.cases.gpu_cliffs"
TURNS = 9
CANDIDATES, PROMPT_TOKENS, TOP_K = 8, 512, 16
SMOLLM2 = ROOT / "models/smollm2-student"
# Engines in this process: a step is a call, and an update comes after so many.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


def main() -> int:
    """Print the rows, and write them where that is asked for; fails when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part called {', '.join(sorted(unknown))}")
    rows = [found for part in arguments.parts or PARTS for found in PARTS[part]()]
    print_rows(rows)
    if arguments.output is not None:
        write_rows(arguments.output, " ".join([COMMAND, *arguments.parts]), rows)
    return 0 if all(found.get("met", True) for found in rows) else 1


def draws() -> list[Row]:
    """Compare the draws of one step with those by one sum over the whole vocabulary."""
    found: list[Row] = []
    for num_rows, vocabulary in ((32, 151_936), (32, 49_152), (64, 112)):
        random = torch.Generator().manual_seed(0)
        logits = torch.randn(num_rows, vocabulary, generator=random) * 4
        uniform = torch.rand(num_rows, CANDIDATES, generator=random, dtype=torch.float64)
        places, ones = torch.arange(num_rows), torch.ones(num_rows, 1)
        size = f"{num_rows} x {vocabulary}, {CANDIDATES} each"
        calls = max(1, 1_000_000 // logits.numel())
        pair = in_turns(
            lambda: _whole_sum(logits[places] / ones, uniform),  # noqa: B023, called at once
            lambda: sample(logits, uniform, places),  # noqa: B023
            calls,
        )
        found += compared("draws of candidates", size, *pair, bar=0.95 if vocabulary < 1000 else 1.5)
    return found


def largest() -> list[Row]:
    """Compare what a teacher's top-k takes with torch's own `topk`, over small and large vocabularies."""
    found: list[Row] = []
    for num_rows, vocabulary in ((4096, 112), (1024, 512), (128, 49_152), (512, 49_152), (128, 151_936)):
        logits = torch.randn(num_rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 4
        size = f"{num_rows} x {vocabulary}, k = {TOP_K}"
        pair = in_turns(lambda: logits.topk(TOP_K), lambda: largest_logits(logits, TOP_K))  # noqa: B023, called at once
        found += compared("largest logits", size, *pair, bar=1.0)
    return found


def _whole_sum(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    log_total = logits.logsumexp(-1, keepdim=True)
    cumulative = (logits - log_total).exp().cumsum(-1, dtype=torch.float64)
    ids = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return ids.int(), logits.gather(-1, ids) - log_total


def micro_batches(count: int = 8, seconds: float = 0.05) -> list[Row]:
    """Compare making micro-batches ahead with making each when it is wanted; making and computing take the same."""

    def made() -> Any:
        for number in range(count):
            time.sleep(seconds)
            yield number

    def compute(batches: Any) -> None:
        for _ in batches:
            time.sleep(seconds)  # an engine on a GPU, which leaves the CPU alone

    device = torch.device("cpu")
    pair = in_turns(lambda: compute(made()), lambda: compute(prefetched(made(), device)))
    return compared("micro-batches of a round", f"{count}, 50 ms to make and 50 ms to compute", *pair, bar=1.5)


def learning(num_rows: int = 16, tokens: int = 128, top_k: int = 16) -> list[Row]:
    """Compare the same with a real engine on this CPU, where making and computing share the cores."""
    random = np.random.default_rng(0)
    rows = [_trajectory(random, number, tokens, top_k) for number in range(num_rows)]
    grids = [((first, first + 1), (first + 2, first + 3)) for first in range(0, num_rows, 4)]
    objective = Objective(msgspec.convert(expand_preset({"preset": "tail-topk"}), ObjectiveConfig))
    engine = ReferenceEngine(Student(small_model(width=128, depth=2)), LearnerConfig(zero_stage=0, dtype="float32"))

    def run(is_ahead: bool) -> None:
        batches: Any = (build_micro_batch(grid, rows, 0) for grid in grids)
        batches = prefetched(batches, torch.device("cpu")) if is_ahead else batches
        accumulate(engine, batches, len(grids), objective, {}, completes_step=False)

    # CPU time: making ahead gains nothing here, and may not cost anything.
    pair = in_turns(lambda: run(False), lambda: run(True), clock=time.process_time)
    size = f"{len(grids)} of 4 x {tokens} tokens, width 128"
    return compared("CPU time of micro-batches learned from", size, *pair, bar=0.95)


def _trajectory(random: np.random.Generator, number: int, tokens: int, top_k: int) -> Trajectory:
    mask = (np.arange(tokens) >= tokens // 4).astype(np.uint8)
    count = int(mask.sum())
    logprobs = random.normal(-2, 1, count).astype(np.float32)
    candidates = random.integers(0, 1024, (count, top_k)).astype(np.int32)
    of_candidates = np.full((count, top_k), -3.0, np.float32)
    scores = {"teacher": {"logprobs": logprobs, "candidate_logprobs": of_candidates}}
    ids = random.integers(0, 1024, tokens).astype(np.int32)
    return Trajectory(number, "main", 0.0, ids, mask, logprobs, candidates, of_candidates[:, :0], scores, {})


def layers(width: int = 512, depth: int = 4) -> list[Row]:
    """Compare decoders with compiled layers, forward and backward, in float32: a small Qwen3, SmolLM2 if it is here."""
    name = f"{depth} layers of width {width}"
    found = _compiled(name, small_model(width, depth), small_model(width, depth), tokens=512)
    if SMOLLM2.exists():
        from transformers import AutoModelForCausalLM

        plain, compiled = (AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32) for _ in range(2))
        found += _compiled("SmolLM2-135M", plain, compiled, tokens=128)
    return found


def _compiled(name: str, plain: Any, compiled: Any, tokens: int) -> list[Row]:
    from learner.model.student import compile_layers

    compile_layers(compiled)
    ids, size = torch.arange(tokens)[None] * 7 % 1024, f"{name}, {tokens} tokens"

    def run(model: Any) -> None:
        model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.square().mean().backward()
        model.zero_grad()

    began = time.perf_counter()
    run(compiled)
    first = row("compiling the layers", size, time.perf_counter() - began, "s")
    pair = in_turns(lambda: run(plain), lambda: run(compiled), turns=3)
    return [first, *compared("decoder, forward and backward", size, *pair)]


def updates(requests: int = 8, tokens: int = 64, every: int = 16) -> list[Row]:
    """Compare generating while caches are reset as for new weights, with running requests' dropped and kept."""
    with tempfile.TemporaryDirectory() as folder:
        small_model(width=256, depth=4).config.save_pretrained(folder)
        dropping, keeping = (
            _engine(folder, name) for name in (None, scheduler_name(KEEPING_SCHEDULER, is_async=False))
        )
        try:
            pair = in_turns(
                lambda: _generate(dropping, requests, tokens, every),
                lambda: _generate(keeping, requests, tokens, every),
                turns=3,
            )
        finally:
            for llm in (dropping, keeping):
                llm.llm_engine.engine_core.shutdown()
    size = f"{requests} requests of {PROMPT_TOKENS} + {tokens} tokens, an update in {every} steps"
    return compared("generating across updates", size, *pair)


def _engine(folder: str, scheduler: str | None) -> Any:
    from vllm import LLM

    return LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float32",
        scheduler_cls=scheduler,
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=8192,
        enable_chunked_prefill=False,
        kv_cache_memory_bytes=1 << 28,
        disable_log_stats=True,
    )


def _generate(llm: Any, requests: int, tokens: int, every: int) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False)
    for index in range(requests):
        prompt = [4 + (place * (index + 3)) % 1000 for place in range(PROMPT_TOKENS)]
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    steps = 0
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        steps += 1
        if steps % every == 0:
            llm.reset_prefix_cache(reset_running_requests=True)


def small_model(width: int, depth: int) -> Any:
    """Build a Qwen3 with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
        max_position_embeddings=1024,
        architectures=["Qwen3ForCausalLM"],
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config)


def in_turns(
    before: Callable[[], Any],
    after: Callable[[], Any],
    calls: int = 1,
    turns: int = TURNS,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[float]]:
    """Return the seconds of one call each, so many times in turns."""
    seconds: tuple[list[float], list[float]] = [], []
    for turn in range(turns + 1):
        for act, kept in zip((before, after), seconds, strict=True):
            began = clock()
            for _ in range(calls):
                act()
            if turn:  # the first warms up
                kept.append((clock() - began) / calls)
    return seconds


def compared(
    name: str, size: str, before: Sequence[float], after: Sequence[float], bar: float | None = None
) -> list[Row]:
    """Return both medians, and the ratio with its bar."""
    ratio = statistics.median(one / other for one, other in zip(before, after, strict=True))
    times = [
        row(f"{name}, {which}", size, 1000 * statistics.median(seconds), "ms")
        for which, seconds in (("before", before), ("after", after))
    ]
    of_both = row(f"{name}, before / after", size, ratio, "ratio")
    return [*times, of_both if bar is None else at_least(of_both, bar)]


PARTS: dict[str, Callable[[], list[Row]]] = {
    "draws": draws,
    "largest": largest,
    "micro_batches": micro_batches,
    "learning": learning,
    "layers": layers,
    "updates": updates,
}


if __name__ == "__main__":
    raise SystemExit(main())
