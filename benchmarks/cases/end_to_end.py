"""Measures completion tokens per second of Preceptor and of TRL: `python -m benchmarks.cases.end_to_end --pair PAIR`.

Same models, prompts and their order, sampling, lengths, learning rate, and objective: the exact reverse KL over the
whole vocabulary. One program at a time has the machine, in turns. In the first round all take part; in later rounds
Preceptor and the fastest of TRL's, the opponent. Start-up and the first steps are left out; both sides are measured
over the same steps, since lengths change while the student learns. Figures are medians over rounds.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path

from benchmarks.harness.model_pairs import PAIRS, missing_models, pair_config
from benchmarks.harness.report import RESULTS, Row, at_least, print_rows, row, write_rows
from benchmarks.harness.runners import Measured, Runner, Span

BAR = 2.0
OURS = (
    Runner("Preceptor, strictly on-policy"),
    Runner("Preceptor, staleness 2", options=("rollout.max_staleness=2",)),
)
GKD = Runner("TRL GKDTrainer", "gkd")
SPINNING_GKD = Runner("TRL GKDTrainer, idle threads spin", "gkd", ("--spin",))
DISTILLATION = Runner("TRL DistillationTrainer", "distillation")
TRL = {"embedded": (GKD, SPINNING_GKD, DISTILLATION), "smollm2": (GKD, DISTILLATION)}

# What a program alone decides has the value that was fastest: a tiny model's decoding steps gain from being compiled.
OURS_ALONE = {"embedded": ("rollout.engine.enforce_eager=false",), "smollm2": ()}

# Long-tailed lengths: most of the embedded student's completions are short, and a few run to the end of the context.
OVERRIDES = {
    "embedded": ("rollout.max_completion_tokens=112",),
    "smollm2": ("rollout.max_completion_tokens=128", "prompts.prompts_per_step=8"),
}
# The embedded student begins to write long completions after about 15 steps.
WARM_UP_STEPS = {"embedded": 15, "smollm2": 1}
STEPS = {"embedded": 25, "smollm2": 2}

Results = Mapping[str, Sequence[Measured]]  # by runner's name, in the order of the rounds


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.end_to_end", description=__doc__)
    parser.add_argument("--pair", choices=PAIRS, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help=f"measured steps of each program; default: {STEPS}")
    parser.add_argument("--warm-up", type=int, help=f"steps before them; default: {WARM_UP_STEPS}")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DATE-end-to-end-PAIR.json")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help=f"after these: {OVERRIDES}")
    options = parser.parse_args()
    pair: str = options.pair
    if lacking := missing_models(pair):
        raise SystemExit(lacking)
    overrides = [*OVERRIDES[pair], *options.overrides]
    span = Span(options.warm_up or WARM_UP_STEPS[pair], options.steps or STEPS[pair])
    results = measure(
        TRL[pair],
        options.rounds,
        lambda runner: runner.run(pair, span, [*overrides, *(OURS_ALONE[pair] if runner in OURS else ())]),
    )
    rows = comparison_rows(results, describe(pair, overrides, span))
    print_rows(rows)
    command = " ".join(["python -m benchmarks.cases.end_to_end --pair", pair, *options.overrides])
    write_rows(options.output or RESULTS / f"{date.today():%Y-%m-%d}-end-to-end-{pair}.json", command, rows)


def measure(theirs: Sequence[Runner], rounds: int, run: Callable[[Runner], Measured]) -> Results:
    """Run the runners in turns."""
    results: dict[str, list[Measured]] = {}
    runners: Sequence[Runner] = (*OURS, *theirs)
    for number in range(1, rounds + 1):
        for runner in runners:
            found = run(runner)
            results.setdefault(runner.name, []).append(found)
            print(
                f"round {number}, {runner.name}: {found.tokens_per_second:,.0f} tokens/s, "
                f"{found.seconds / found.steps:.2f} s per step, load average before {found.load_average:.2f}",
                flush=True,
            )
        opponent = fastest(results, [runner.name for runner in theirs])
        runners = (*OURS, *(runner for runner in theirs if runner.name == opponent))
    return results


def fastest(results: Results, names: Sequence[str]) -> str:
    """Return which of the named was fastest in the first round."""
    return max(names, key=lambda name: results[name][0].tokens_per_second)


def comparison_rows(results: Results, size: str) -> list[Row]:
    """Return every runner's figures, and ours against those of TRL's that took part in all rounds."""
    ours = [runner.name for runner in OURS]
    opponent = fastest(results, [name for name in results if name not in ours])
    rows = [found for name, measured in results.items() for found in _contender_rows(name, measured, size)]
    for name in ours:
        ratios = [
            one.tokens_per_second / other.tokens_per_second
            for one, other in zip(results[name], results[opponent], strict=True)
        ]
        rows.append(at_least(_over_rounds(f"end to end: {name} / {opponent}", size, ratios, "ratio"), BAR))
    return rows


def _contender_rows(name: str, measured: Sequence[Measured], size: str) -> list[Row]:
    speeds = [found.tokens_per_second for found in measured]
    costs = [found.cpu_seconds_per_1000_tokens for found in measured]
    lengths = [found.completion_tokens / found.steps for found in measured]
    longest = [found.longest_tokens for found in measured]
    loads = [round(found.load_average, 2) for found in measured]
    return [
        {**_over_rounds(f"end to end: {name}", size, speeds, "tokens/s"), "load_averages": loads},
        _over_rounds(f"end to end: {name}, CPU per 1,000 tokens", size, costs, "CPU-s"),
        _over_rounds(f"end to end: {name}, tokens per step", size, lengths, "tokens"),
        _over_rounds(f"end to end: {name}, longest completion of a step", size, longest, "tokens"),
    ]


def _over_rounds(name: str, size: str, values: Sequence[float], unit: str) -> Row:
    """Return the median over rounds, with the smallest and the largest value."""
    found = row(name, size, statistics.median(values), unit)
    return {**found, "min": round(min(values), 6), "max": round(max(values), 6), "rounds": len(values)}


def describe(pair: str, overrides: Sequence[str], span: Span) -> str:
    """Say what was trained.

    Example:
        >>> describe("embedded", ["rollout.max_completion_tokens=112"], Span(5, 20))
        'embedded pair, 96 x at most 112 tokens, 20 steps'
    """
    config = pair_config(pair, overrides)
    count = config.prompts.prompts_per_step * config.rollout.samples_per_prompt
    return f"{pair} pair, {count} x at most {config.rollout.max_completion_tokens} tokens, {span.steps} steps"


if __name__ == "__main__":
    main()
