"""`python -m benchmarks.cases.teacher_scoring`: how fast a teacher scores, next to what its engine cannot do without.

All cases read the same random trajectories, in turns, and each figure is a median over the turns. Raw prefill is the
teacher's own engine asked for one vector per trajectory, the least that it can return; `prompt_logprobs` is how vLLM
scores by itself, as flat lists and as dicts of objects. Ours is the whole way from an Arrow batch to the batch with new
columns.
"""

import argparse
import asyncio
import json
import math
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional

from benchmarks.harness.process_trees import cpu_seconds, descendants, spent
from benchmarks.harness.report import RESULTS, Row, at_least, describe_machine, print_rows, row
from cluster.config.stages import Dtype, EngineConfig, TeacherConfig
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import GeneratedTrajectory, Ints, make_generated, ragged
from cluster.models.lm_head import LmHead, load_lm_head, multiplies_wide
from cluster.models.token_scores import chunk_size
from cluster.vllm.engine import prepare_environment

if TYPE_CHECKING:
    from teacher_workers.actor import TeacherWorker

ROOT = Path(__file__).parents[2]
TOP_K = 16
ROWS_PER_BATCH = 8
LEAST_OF_UNAVOIDABLE = 0.95
LEAST_OF_DICTS = {16: 2.5, 64: 3.0}  # by k
FORMER = ("a request per row", "head in the actor")  # ways in which teachers scored before
Cases = dict[str, Callable[[], Awaitable[Any]]]
Times = np.ndarray[Any, np.dtype[np.float64]]  # [repeats]


@dataclass(frozen=True)
class Setting:
    """One model, and the trajectories that it reads."""

    name: str
    model: str
    dtype: Dtype
    num_rows: int
    prompt_tokens: int
    longest_tokens: int  # trajectories are half as long to as long


ENGINE = EngineConfig(kv_cache_gib=0.25)


@dataclass(frozen=True)
class Plan:
    """What is asked of a model, and how often."""

    top_ks: tuple[int, ...] = (TOP_K,)
    repeats: int = 7
    threads: int | None = None
    engine: EngineConfig = ENGINE  # dtype and threads come from elsewhere
    seconds: float = math.inf  # no turn begins later than this; two always do
    is_alone: bool = False  # whether to leave out what vLLM scores by itself


SETTINGS = {
    "embedded": Setting("embedded teacher", str(ROOT / "cluster/embedded/teacher"), "float32", 256, 16, 126),
    "smollm2": Setting("SmolLM2-135M", str(ROOT / "models/smollm2-135m-instruct"), "bfloat16", 32, 32, 160),
}


def main() -> int:
    """Measure and write the rows; exit code 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.teacher_scoring", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, help="trajectories; default: 256 of the embedded teacher, 32 of SmolLM2")
    parser.add_argument("--alone", action="store_true", help="leave out what vLLM scores by itself")
    parser.add_argument("--threads", type=int, help="of each engine and of the LM head; default: all cores")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today():%Y-%m-%d}-teacher-scoring.json")
    options = parser.parse_args()
    rows = []
    for name in options.models:
        plan = Plan(repeats=options.repeats, threads=options.threads, is_alone=options.alone)
        setting = replace(SETTINGS[name], num_rows=options.rows or SETTINGS[name].num_rows)
        rows += asyncio.run(measure(setting, plan))
    print_rows(rows)
    described = {
        "command": " ".join(["python -m benchmarks.cases.teacher_scoring", *sys.argv[1:]]),
        **describe_machine(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": described, "rows": rows}, indent=1) + "\n")
    return 0 if all(found.get("met", True) for found in rows) else 1


async def measure(setting: Setting, plan: Plan) -> list[Row]:
    """Start the engines of one model, time all cases in turns, and end the engines."""
    engine = msgspec.structs.replace(plan.engine, dtype=setting.dtype, cpu_threads=plan.threads)
    prepare_environment(engine)
    torch.set_num_threads(plan.threads or torch.get_num_threads())
    from benchmarks.harness.scoring_engines import HeadInActor, MeasuredEngine, RequestPerRow, build_generating_engine
    from teacher_workers.actor import TeacherWorker  # Ray, which the batches of `benchmarks.gpu` need not have

    context = setting.longest_tokens + 1  # vLLM's own scoring must generate a token
    teacher = TeacherConfig(model=setting.model, engine=engine)
    ours = MeasuredEngine(teacher, context)
    generating = None if plan.is_alone else build_generating_engine(teacher, context, max(plan.top_ks))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head = load_lm_head(teacher.model, teacher.trust_remote_code, engine.dtype).to(device)
    backends: list[Any] = [ours, RequestPerRow(ours), HeadInActor(ours, head)]
    worker, *former = (TeacherWorker("teacher", backend) for backend in backends)
    if multiplies_wide(head.weight.dtype, device):  # the engine does, so what it cannot do without takes no longer
        head = replace(head, weight=head.weight.float())
    batches = make_batches(setting, head.vocabulary_size)
    try:
        seconds, cpu = await _interleaved(
            _cases(Parts(ours, generating, worker, former, head), batches, plan.top_ks), plan
        )
    finally:
        await ours.shutdown()
        if generating is not None:
            generating.shutdown()
    num_tokens = sum(int(ragged(batch, "token_ids").offsets[-1]) for batch in batches)
    size = f"{setting.name}, {setting.num_rows} rows, {num_tokens} tokens"
    return [*_rows_of(seconds, size, num_tokens, plan.top_ks), *_cpu_rows_of(cpu, size, setting.num_rows, plan.top_ks)]


@dataclass(frozen=True)
class Parts:
    """What is measured; the engines are those of `scoring_engines`."""

    ours: Any
    generating: Any  # None: not measured
    worker: "TeacherWorker"
    former: Sequence["TeacherWorker"]  # of FORMER
    head: LmHead


def _cases(parts: Parts, batches: Sequence[pa.RecordBatch], top_ks: Sequence[int]) -> Cases:
    """Return what is timed."""
    from benchmarks.harness.scoring_engines import read_prompt_logprobs

    ours, former = parts.ours, dict(zip(FORMER, parts.former, strict=True))
    sequences = [ids for batch in batches for ids in _rows(batch)]
    num_completion = sum(len(ragged(batch, "rollout_logprobs").values) for batch in batches)

    async def score(worker: "TeacherWorker" = parts.worker, **asked: Any) -> None:
        await ours.forget()
        await asyncio.gather(*(worker.score(batch, ScoreRequest("teacher", **asked)) for batch in batches))

    def vllm_scores(top_k: int | None, is_flat: bool) -> Awaitable[None]:
        return read_prompt_logprobs(parts.generating, sequences, top_k, is_flat)

    cases: Cases = {
        "raw prefill": lambda: ours.prefill(sequences),
        "LM head alone": lambda: asyncio.to_thread(_multiply, parts.head, num_completion),
        "hidden states": lambda: ours.read_hidden(sequences),
        "sampled": score,
        **{f"sampled, {name}": partial(score, worker) for name, worker in former.items()},
        f"topk {top_ks[0]}, entropy, hidden": lambda: score(top_k=top_ks[0], entropy=True, hidden=True),
    }
    for top_k in top_ks:
        cases[f"topk {top_k}"] = partial(score, top_k=top_k)
        cases |= {f"topk {top_k}, {name}": partial(score, worker, top_k=top_k) for name, worker in former.items()}
    if parts.generating is not None:
        cases["generating engine, raw prefill"] = lambda: vllm_scores(None, is_flat=True)
        cases["prompt_logprobs 0, flat"] = lambda: vllm_scores(0, is_flat=True)
        for top_k in top_ks:
            cases[f"prompt_logprobs {top_k}, flat"] = partial(vllm_scores, top_k, is_flat=True)
            cases[f"prompt_logprobs {top_k}, dicts"] = partial(vllm_scores, top_k, is_flat=False)
    return cases


def make_batches(setting: Setting, vocabulary_size: int, shortest: int | None = None) -> list[pa.RecordBatch]:
    """Draw trajectories of random tokens; without a shortest length, it is half the longest."""
    draw = np.random.default_rng(0)
    trajectories = []
    for index, length in enumerate(
        draw.integers(shortest or setting.longest_tokens // 2, setting.longest_tokens, setting.num_rows)
    ):
        ids = draw.integers(3, vocabulary_size, length, dtype=np.int32)
        mask = (np.arange(length) >= setting.prompt_tokens).astype(np.uint8)
        logprobs = -draw.random(length - setting.prompt_tokens, dtype=np.float32)
        trajectories.append(GeneratedTrajectory(index, index, 0, "main", "", 0, 0, ids, mask, logprobs, "stop", None))
    firsts = range(0, len(trajectories), ROWS_PER_BATCH)
    return [make_generated(trajectories[first : first + ROWS_PER_BATCH]) for first in firsts]


async def _interleaved(cases: Cases, plan: Plan) -> tuple[dict[str, Times], dict[str, Times]]:
    """Return the seconds of each case in each turn, and the CPU-seconds of this process and the engines.

    The first turn warms up and is left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    processes = descendants(os.getpid())
    began = time.perf_counter()
    for turn in range(plan.repeats + 1):
        if turn > 1 and time.perf_counter() - began > plan.seconds:
            break
        for name, case in cases.items():
            started, before = time.perf_counter(), cpu_seconds(processes)
            await case()
            seconds[name].append(time.perf_counter() - started)
            cpu[name].append(spent(before, cpu_seconds(processes)))
    of_wall, of_cpu = ({name: np.array(values[1:]) for name, values in each.items()} for each in (seconds, cpu))
    return of_wall, of_cpu


def _rows_of(seconds: dict[str, Times], size: str, num_tokens: int, top_ks: Sequence[int]) -> list[Row]:
    """Ratios are taken within a turn, where noise meets both sides alike."""
    raw, head, sampled = (seconds[name] for name in ("raw prefill", "LM head alone", "sampled"))

    def ratio(name: str, values: Times) -> Row:
        return row(f"score: {name}", size, float(np.median(values)), "ratio")

    rows = [
        *(
            row(f"score: {name}", size, float(num_tokens / np.median(each)), "tokens/s")
            for name, each in seconds.items()
        ),
        ratio("LM head's time / raw prefill's", head / raw),
        ratio("sampled / raw prefill", raw / sampled),
        at_least(ratio("sampled / (prefill + head)", (raw + head) / sampled), LEAST_OF_UNAVOIDABLE),
        *(ratio(f"sampled / sampled, {name}", seconds[f"sampled, {name}"] / sampled) for name in FORMER),
    ]
    for top_k in top_ks:
        topk = seconds[f"topk {top_k}"]
        rows += [
            ratio(f"topk {top_k} / raw prefill", raw / topk),
            at_least(ratio(f"topk {top_k} / (prefill + head)", (raw + head) / topk), LEAST_OF_UNAVOIDABLE),
            *(
                ratio(f"topk {top_k} / topk {top_k}, {name}", seconds[f"topk {top_k}, {name}"] / topk)
                for name in FORMER
            ),
        ]
        dicts = seconds.get(f"prompt_logprobs {top_k}, dicts")
        if dicts is not None:
            of_dicts = ratio(f"topk {top_k} / dicts", dicts / topk)
            rows.append(at_least(of_dicts, LEAST_OF_DICTS[top_k]) if top_k in LEAST_OF_DICTS else of_dicts)
    return rows


def _cpu_rows_of(cpu: dict[str, Times], size: str, num_rows: int, top_ks: Sequence[int]) -> list[Row]:
    """Compare CPU-seconds, which other programs on the machine change less than they change seconds."""
    unavoidable = cpu["raw prefill"] + cpu["LM head alone"]
    rows = [
        row(f"score: CPU of {name}", size, 1e3 * float(np.median(values)) / num_rows, "ms per row")
        for name, values in cpu.items()
    ]
    for name in ("sampled", *(f"topk {top_k}" for top_k in top_ks)):
        former = {f"{name}, {before}": cpu[f"{name}, {before}"] for before in FORMER}
        for against, times in {"(prefill + head)": unavoidable, **former}.items():
            value = float(np.median(times / cpu[name]))
            rows.append(row(f"score: CPU-seconds of {against} / {name}", size, value, "ratio"))
    return rows


def _rows(batch: pa.RecordBatch) -> Sequence[Ints]:
    token_ids = ragged(batch, "token_ids")
    return [token_ids[index] for index in range(len(token_ids))]


def _multiply(head: LmHead, num_tokens: int) -> None:
    """Do the head's matrix product for all completion tokens and nothing else."""
    device = head.weight.device
    hidden = torch.ones(num_tokens, head.weight.shape[1], dtype=head.weight.dtype, device=device)
    for chunk in hidden.split(chunk_size(head)):
        functional.linear(chunk, head.weight, head.bias)
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
