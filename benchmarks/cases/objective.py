"""Measures the time and memory of objectives beside the LM head's products: `python -m benchmarks.cases.objective`.

The unit is plain cross-entropy of the same student head, forward and backward: three products of tokens x width x
vocabulary. An objective over the whole vocabulary has one more, with the teacher's head, so its time is compared per
product. On a CPU, time is what the process computes on all its threads, which other processes' load does not change
much; threads that spin while they wait would count as well, so set OMP_WAIT_POLICY=PASSIVE.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.report import RESULTS, Row, describe_machine, print_rows, row
from cluster.config.objective import ObjectiveConfig
from cluster.config.terms import (
    CrossEntropyTerm,
    DivergenceTerm,
    GateConfig,
    ImportanceConfig,
    PolicyGradientTerm,
    RepresentationTerm,
)
from cluster.models.lm_head import LmHead
from learner.batching.micro_batch import MicroBatch, RoutedTokens
from learner.loss.kernels.choice import choose_kernels
from learner.loss.objective import Objective
from learner.loss.tokens import CompletionTokens
from learner.model.completion_head import CompletionHead, chunk_size
from learner.model.projection import LogitScaling

COMMAND = "OMP_WAIT_POLICY=PASSIVE python -m benchmarks.cases.objective"
VOCABULARY, WIDTH = 151_936, 1_024
TIMED_TOKENS = 1_024
MEMORY_TOKENS = (256, 1_024, 4_096)
MEMORY_CHUNK_TOKENS = 256  # so that a chunk of logits, the largest part, is the same for all
MAX_GROWTH = 1.1  # the gradient of the hidden states, and some figures per token
CPU_THREADS = 2
MAX_ON_GPU = 1.2  # of exact divergences, time per product
ROUTE = "teacher"
SAMPLED = ObjectiveConfig(support="sampled", terms={"main": PolicyGradientTerm()})
SAMPLES = ObjectiveConfig(
    support="samples",
    support_size=16,
    terms={"main": PolicyGradientTerm(over="support", importance=ImportanceConfig())},
)

LAST_STATES = ObjectiveConfig(
    support="sampled", terms={"main": PolicyGradientTerm(), "states": RepresentationTerm(normalise="rms")}
)
WITHOUT_RESIDUAL = ObjectiveConfig(support="topk", support_size=16, terms={"main": DivergenceTerm(residual=False)})
DEFAULT, TOP_16 = "top-16 and tail, reverse KL", ObjectiveConfig(support="topk", support_size=16)
CLIPPED = ObjectiveConfig(support="topk", support_size=16, terms={"main": DivergenceTerm(entry_clip=2.0)})
STRICT = ObjectiveConfig(
    support="student_topk", support_size=16, terms={"main": DivergenceTerm(truncation="renormalized")}
)
IMITATED = ObjectiveConfig(support="sampled", terms={"main": CrossEntropyTerm(gate=GateConfig())})
STOPS = (2, 5, 11, 4099)


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and where."""

    device: torch.device
    dtype: torch.dtype
    vocabulary: int = VOCABULARY
    width: int = WIDTH
    timed_tokens: int = TIMED_TOKENS
    memory_tokens: tuple[int, ...] = MEMORY_TOKENS
    memory_chunk_tokens: int = MEMORY_CHUNK_TOKENS


@dataclass(frozen=True)
class Case:
    """One objective, and the width of the teacher's hidden states, in that of the student's, if it needs them."""

    name: str
    config: ObjectiveConfig
    teacher_widths: int = 0
    bar: float | None = None  # time per product, in that of cross-entropy
    stop_class: tuple[int, ...] = ()
    beside: str = ""  # the case that it differs from by one term or setting
    bar_beside: float | None = None  # time, in that case's

    @property
    def products(self) -> float:
        """Return how many products of tokens x width x vocabulary one forward and backward take."""
        return 3 + self.teacher_widths


def exact(divergence: str) -> ObjectiveConfig:
    """Return a divergence over the whole vocabulary."""
    return ObjectiveConfig(support="full", terms={"main": DivergenceTerm(divergence=divergence)})


CASES = [
    Case("sampled policy gradient", SAMPLED, bar=1.1),
    Case("sampled policy gradient and last states", LAST_STATES, bar=1.1, beside="sampled policy gradient"),
    Case("policy gradient over 16 draws", SAMPLES, bar=1.1),
    Case(DEFAULT, TOP_16, bar=1.1, beside="top-16 and tail, no residual", bar_beside=1.03),
    Case("top-16 and tail, no residual", WITHOUT_RESIDUAL, bar=1.1),
    Case("top-16 and tail, entries clipped", CLIPPED, bar=1.1, beside="top-16 and tail, no residual"),
    Case("top-16 renormalised, of the student", STRICT, bar=1.1, beside="top-16 and tail, no residual"),
    Case("gated cross-entropy of sampled tokens", IMITATED, bar=1.1, beside="sampled policy gradient"),
    Case("four stop ids as one", TOP_16, bar=1.1, stop_class=STOPS, beside=DEFAULT),
    Case("top-64 and tail, reverse KL", ObjectiveConfig(support="topk", support_size=64), bar=1.1),
    Case("exact reverse KL", exact("reverse_kl"), teacher_widths=1, bar=1.3),
    Case("exact reverse KL, wide teacher", exact("reverse_kl"), teacher_widths=2, bar=1.3),
    Case("exact JSD", exact("jsd"), teacher_widths=1, bar=1.3),
]
MEMORY_CASES = (DEFAULT, "exact reverse KL")
SAME_MEMORY = 1.001  # of the residual, in that without it


class Bench:
    """A student head, teacher heads, and hidden states for so many tokens, all random."""

    def __init__(self, num_tokens: int, sizes: Sizes) -> None:
        self.device, self.dtype, self.num_tokens = sizes.device, sizes.dtype, num_tokens
        self.sizes, self.random = sizes, torch.Generator(sizes.device).manual_seed(0)
        vocabulary, width = sizes.vocabulary, sizes.width
        linear = nn.Linear(width, vocabulary, bias=False, device=self.device, dtype=self.dtype)
        self.head = CompletionHead(linear, LogitScaling())
        self.hidden = self.normal(num_tokens, width)
        self.targets = torch.randint(vocabulary, (num_tokens,), generator=self.random, device=self.device)
        widths = {case.teacher_widths for case in CASES if case.teacher_widths}
        self.teacher_heads = {times: LmHead(self.normal(vocabulary, times * width, scale=0.05)) for times in widths}
        self.batches = {case.name: self.batch_of(case) for case in CASES}
        self.kernels = choose_kernels(sizes.device, whole_vocabulary=True)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.random, device=self.device) * scale).to(self.dtype)

    def batch_of(self, case: Case) -> MicroBatch:
        """Return a micro-batch of one trajectory with the columns that the objective reads."""
        n, k = self.num_tokens, case.config.needs.num_candidates
        flat, nothing = torch.full((n,), -12.0, device=self.device), torch.empty(0, device=self.device)
        drawn = k if case.config.needs.candidates_from == "student" else 0
        of_candidates = torch.full((n, k), -12.0, device=self.device)
        tokens = CompletionTokens(
            target_ids=self.targets,
            rollout_logprobs=flat,
            candidate_ids=torch.randint(self.sizes.vocabulary, (n, k), generator=self.random, device=self.device),
            candidate_rollout_logprobs=of_candidates[:, :drawn],
            scores={"teacher": {"logprobs": flat - 1, **({"candidate_logprobs": of_candidates - 1} if k else {})}},
            trajectory=torch.zeros(n, dtype=torch.int64, device=self.device),
            position=torch.arange(n, device=self.device),
            length=torch.full((n,), n, device=self.device),
            uniform=torch.rand(n, generator=self.random, device=self.device),
            task_advantage=torch.zeros(n, device=self.device),
            reward=torch.zeros(n, device=self.device),
            weight=torch.ones(n, device=self.device),
        )
        places = torch.arange(n, device=self.device)
        widths = 1 if case.config.needs.last_states else case.teacher_widths
        wide = {"hidden": self.normal(n, widths * self.sizes.width)} if widths else {}
        routes = (RoutedTokens(ROUTE, places, {"teacher": wide}),)
        return MicroBatch(nothing, nothing, nothing, places, (n,), tokens, routes)

    def run(self, case: Case, *, plain: bool = False) -> None:
        """Run the learner's head forward and backward; plain: without kernels over the logits."""
        hidden = self.hidden.detach().requires_grad_()
        heads = {ROUTE: {"teacher": self.teacher_heads[case.teacher_widths]}} if case.teacher_widths else {}
        objective = Objective(case.config, None if plain else self.kernels)
        vocabulary = self.head.weight.shape[0]  # a dry run's is small
        self.head.stop_class = tuple(token_id % vocabulary for token_id in case.stop_class)
        states = dict.fromkeys(objective.student_layers(1), hidden)
        loss, *_ = self.head(hidden, self.batches[case.name], objective, heads, states, depth=1)
        torch.autograd.backward(loss / self.num_tokens)
        self.head.weight.grad = None

    def cross_entropy(self, chunk_tokens: int) -> None:
        """Run torch's cross-entropy over the same head, with one backward per chunk."""
        for part, targets in zip(self.hidden.split(chunk_tokens), self.targets.split(chunk_tokens), strict=True):
            logits = part.detach().requires_grad_() @ self.head.weight.t()
            loss = functional.cross_entropy(logits.float(), targets, reduction="sum")
            torch.autograd.backward(loss / self.num_tokens)
        self.head.weight.grad = None


def main() -> int:
    """Measure and write the rows; exit code 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.objective", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=TIMED_TOKENS, help="that are timed")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--memory-tokens", type=int, nargs="+", default=MEMORY_TOKENS)
    parser.add_argument(
        "--output", type=Path, help="JSON file to write; default: benchmarks/results/DATE-objective.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(CPU_THREADS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = Sizes(
        device,
        dtype,
        vocabulary=options.vocabulary,
        timed_tokens=options.tokens,
        memory_tokens=tuple(options.memory_tokens),
    )
    rows = [*time_rows(sizes, options.repeats), *memory_rows(sizes)]
    print_rows(rows)
    output = options.output or RESULTS / f"{date.today():%Y-%m-%d}-objective.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    described = {"command": " ".join([COMMAND, *sys.argv[1:]]), "device": name_of(device), **describe_machine()}
    output.write_text(json.dumps({"machine": described, "rows": rows}, indent=1) + "\n")
    return 0 if all(found["met"] for found in rows if "met" in found) else 1


def time_rows(sizes: Sizes, repeats: int) -> list[Row]:
    """Time every case and two kinds of cross-entropy in turns; where kernels are used, also without them."""
    device, num_tokens = sizes.device, sizes.timed_tokens
    bench = Bench(num_tokens, sizes)
    runs: dict[str, Callable[[], None]] = {
        "cross-entropy, whole": lambda: bench.cross_entropy(num_tokens),
        "cross-entropy, in chunks": lambda: bench.cross_entropy(chunk_size(sizes.vocabulary, device)),
        **{case.name: partial(bench.run, case) for case in CASES},
    }
    plain = {} if bench.kernels is None else {f"{case.name}, plain": case for case in CASES}
    runs |= {name: partial(bench.run, case, plain=True) for name, case in plain.items()}
    seconds = interleaved(runs, device, repeats)
    baseline = min(list(runs)[:2], key=lambda name: seconds[name])
    size = f"{num_tokens} tokens, {str(sizes.dtype).removeprefix('torch.')}"
    unit = "s" if device.type == "cuda" else "CPU-s"
    rows = [row(name, size, value, unit) for name, value in seconds.items()]
    for name, case in ({case.name: case for case in CASES} | plain).items():
        ratio = (seconds[name] / case.products) / (seconds[baseline] / 3)
        bar = MAX_ON_GPU if device.type == "cuda" and case.teacher_widths else case.bar
        rows.append(
            with_bar(row(f"{name}, per product", f"of {baseline}", ratio, "ratio"), None if name in plain else bar)
        )
    for case in CASES:
        if case.beside:
            beside = row(case.name, f"of {case.beside}", seconds[case.name] / seconds[case.beside], "ratio")
            rows.append(with_bar(beside, case.bar_beside))
    return rows


def memory_rows(sizes: Sizes) -> list[Row]:
    """Measure the peak memory above what is held before, for more and more tokens."""
    rows = []
    for name in MEMORY_CASES:
        case = next(case for case in CASES if case.name == name)
        peaks = {}
        for num_tokens in sizes.memory_tokens:
            bench = Bench(num_tokens, sizes)
            bench.head.chunk_tokens = sizes.memory_chunk_tokens
            peaks[num_tokens] = peak_bytes(partial(bench.run, case), sizes.device)
            rows.append(
                row(
                    f"peak memory, {name}",
                    f"{num_tokens} tokens, chunks of {sizes.memory_chunk_tokens}",
                    peaks[num_tokens] / 1e9,
                    "GB",
                )
            )
            del bench
        least, most = min(sizes.memory_tokens), max(sizes.memory_tokens)
        growth = (peaks[most] - peaks[least]) / ((most - least) * sizes.width * sizes.dtype.itemsize)
        rows.append(with_bar(row(f"growth of peak, {name}", "in [tokens, width]", growth, "ratio"), MAX_GROWTH))
    return [*rows, *memory_beside(sizes)]


def memory_beside(sizes: Sizes) -> list[Row]:
    """Compare the peaks of cases that differ by one term or setting, at the fewest tokens."""
    num_tokens = min(sizes.memory_tokens)
    bench = Bench(num_tokens, sizes)
    bench.head.chunk_tokens = sizes.memory_chunk_tokens
    named = {case.name: case for case in CASES}
    pairs = [(case, named[case.beside]) for case in CASES if case.beside]
    compared = {case.name: case for pair in pairs for case in pair}
    peaks = {name: peak_bytes(partial(bench.run, case), sizes.device) for name, case in compared.items()}
    return [
        with_bar(
            row(f"peak memory, {case.name}", f"of {other.name}", peaks[case.name] / peaks[other.name], "ratio"),
            SAME_MEMORY if case.bar_beside else None,
        )
        for case, other in pairs
    ]


def interleaved(runs: dict[str, Callable[[], None]], device: torch.device, repeats: int) -> dict[str, float]:
    """Return the median seconds of each, after one run that warms up, in turns so that noise meets them alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            started = now(device)
            run()
            if repeat:
                times[name].append(now(device) - started)
    return {name: statistics.median(values) for name, values in times.items()}


def now(device: torch.device) -> float:
    """Return seconds: of a GPU, after all of its work; of a CPU, those that this process has computed."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Return the most memory that torch holds at once of what it allocates during a run."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    assert found.profiler is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def with_bar(found: Row, bar: float | None) -> Row:
    """Add the bar that the figure has to meet."""
    return found if bar is None else {**found, "bar": f"<= {bar:g}", "met": found["value"] <= bar}


def name_of(device: torch.device) -> str:
    """Return what computes."""
    return f"CPU, {CPU_THREADS} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)


if __name__ == "__main__":
    sys.exit(main())
