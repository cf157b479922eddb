"""What `preceptor plan` predicts, against stub engines on real Ray: `python -m benchmarks.cases.plan`.

For each workload (harness/workloads.py), splits of its replicas are measured in turns, and predicted twice: from
the stubs' true rates, and from rates that are read off the calls of a strictly on-policy probe of one split, as plan
reads those of a run that is over. Bar: the predicted step time is within 10 % of the measured one.

`--measure FILE` measures only (workloads may be named, so that it can be done in parts), `--from FILE ...` reads that.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Any

import msgspec

from benchmarks.harness.plan_measuring import Measured, measure, strictly
from benchmarks.harness.report import RESULTS, Row, at_most, print_rows, row, write_rows
from benchmarks.harness.workloads import PROMPT_TOKENS, WORKLOADS, Split, Workload
from cluster.config.run_config import Config
from cluster.contracts.batches import Span
from cluster.nodes.local_cluster import local_cluster
from cluster.simulation.measured_rates import FIRST_STEP, RunStep, rates_from
from cluster.simulation.rates import LearnerRates, LogNormal, Rates, RolloutRates, TeacherRates
from cluster.simulation.simulated_run import Demand, simulate
from cluster.simulation.simulated_run import Split as Workers

MOST_OFF = 1.1
SIMULATED_STEPS = 48


def main() -> None:
    """Measure, predict, print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.plan", description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=[], help="beginnings of names; default: all")
    parser.add_argument("--turns", type=int, default=8, help="measured steps, or series of steps, of each split")
    parser.add_argument("--measure", type=Path, help="measure only, and write what was found there")
    parser.add_argument("--from", dest="sources", type=Path, nargs="+", help="what --measure wrote")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/DATE-plan.json")
    options = parser.parse_args()
    if options.sources:
        measured = [one for source in options.sources for one in json.loads(source.read_text())]
    else:
        chosen = [one for one in WORKLOADS if not options.workloads or one.name.startswith(tuple(options.workloads))]
        measured = []
        with local_cluster(num_cpus=4, include_dashboard=False, log_to_driver=False):
            for workload in chosen:
                measured += [asdict(one) for one in measure(workload, options.turns)]
                print(f"measured: {workload.name}", flush=True)
                if options.measure:
                    options.measure.write_text(json.dumps(measured))
    if options.measure:
        return
    rows = [found for workload in WORKLOADS for found in compare(workload, parse(measured, workload.name))]
    print_rows(rows)
    output = options.output or RESULTS / f"{date.today():%Y-%m-%d}-plan.json"
    write_rows(output, "python -m benchmarks.cases.plan", rows)
    print(f"written: {output}")


def parse(measured: Sequence[Mapping[str, Any]], name: str) -> list[Measured]:
    """Return what was measured of one workload, from its JSON values."""
    return [
        Measured(
            name, Split(**one["split"]), one["step_seconds"], one["records"], [Span(**span) for span in one["spans"]]
        )
        for one in measured
        if one["workload"] == name
    ]


def compare(workload: Workload, measured: Sequence[Measured]) -> list[Row]:
    """Return the predicted over the measured step time of every split, and what the plan's choice costs."""
    if not measured:
        return []
    probe, *measured = measured
    from_run = rates_of_probe(workload, probe)
    rows = []
    predicted: dict[str, float] = {}
    for one in measured:
        size = f"{workload.name}: {one.split}"
        seconds = typical(workload, one.step_seconds)
        predicted[str(one.split)] = predict(workload, true_rates(workload), one.split)
        from_measured = predict(workload, from_run, one.split)
        rows += [
            row("step, measured", size, seconds, "s"),
            within(row("predicted / measured step", size, predicted[str(one.split)] / seconds, "ratio")),
            within(row("the same, rates read off a run", size, from_measured / seconds, "ratio")),
        ]
    found = {str(one.split): typical(workload, one.step_seconds) for one in measured}
    best, chosen = min(found, key=found.__getitem__), min(predicted, key=predicted.__getitem__)
    size = f"{workload.name}: plan {chosen}, measured best {best}"
    return [
        *rows,
        at_most(
            row("plan's split / best measured split, measured step", size, found[chosen] / found[best], "ratio"),
            MOST_OFF,
        ),
    ]


def typical(workload: Workload, seconds: Sequence[float]) -> float:
    """Return a step's seconds: the median, or the mean where steps lend each other time."""
    return mean(seconds) if workload.max_staleness else median(seconds)


def within(found: Row) -> Row:
    """Add the bar of a ratio that should be 1."""
    return {**found, "bar": f"{1 / MOST_OFF:.2f} to {MOST_OFF:.2f}", "met": 1 / MOST_OFF <= found["value"] <= MOST_OFF}


def predict(workload: Workload, rates: Rates, split: Split) -> float:
    """Return a step's seconds in simulated time."""
    config = one_batch_at_a_time(workload.config)
    demand = Demand(config, rates, num_prompts=workload.rows_per_step)
    found = simulate(config, rates, Workers(split.rollout, split.teachers, 1), demand, SIMULATED_STEPS)
    return typical(workload, found.step_seconds)


def true_rates(workload: Workload) -> Rates:
    """Return what the stubs are made to do."""
    stub, rows = workload.rates, sum(workload.teachers.values())
    points = tuple(
        (running, stub.seconds_per_token + running * stub.seconds_per_running)
        for running in (1, stub.concurrent_sequences)
    )
    return Rates(
        rollout=RolloutRates(points, (PROMPT_TOKENS,), LogNormal(stub.median_length, stub.sigma, stub.longest)),
        teachers={
            name: TeacherRates(stub.score_tokens_per_second, share=share / rows)
            for name, share in workload.teachers.items()
        },
        learner=LearnerRates(stub.learn_tokens_per_second),
    )


def rates_of_probe(workload: Workload, probe: Measured) -> Rates:
    """Read rates off measured steps, as `preceptor plan` does off a run's directory."""
    steps = [msgspec.convert({**record, "step": FIRST_STEP}, RunStep) for record in probe.records]
    return rates_from(strictly(workload.config), steps, probe.spans, str(probe.split))


def one_batch_at_a_time(config: Config) -> Config:
    """Return the run with teachers that read as the stubs do."""
    teachers = {
        name: msgspec.structs.replace(teacher, engine=msgspec.structs.replace(teacher.engine, max_batched_tokens=1))
        for name, teacher in config.teachers.items()
    }
    return msgspec.structs.replace(config, teachers=teachers)


if __name__ == "__main__":
    main()
