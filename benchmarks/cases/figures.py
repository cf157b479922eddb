"""`python -m benchmarks.cases.figures`: draws the figures of benchmarks/results from the newest JSON files there.

A figure whose file is missing is left as it is. Nothing here needs a display: figures are made without pyplot.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.harness.report import RESULTS, Row

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # told apart by colour-blind readers too
INCHES, DOTS_PER_INCH = (6.4, 3.6), 120
LABEL_CHARACTERS = 84  # of the labels below groups, across a figure
END_TO_END = "end to end: "
Document = dict[str, Any]  # a result file


def main() -> None:
    """Draw every figure whose figures are there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.figures", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to read from and to draw into")
    folder = parser.parse_args().results
    drawings: dict[str, tuple[str, Callable[[Document, Path], None]]] = {
        "staleness.png": ("*-staleness.json", draw_staleness),
        "soak.png": ("*-soak.json", draw_soak),
        "end_to_end.png": ("latest.json", draw_end_to_end),
        "privileged_context.png": ("*-privileged-context.json", draw_privileged_context),
        "privileged_sampling.png": ("*-privileged-sampling.json", draw_privileged_sampling),
    }
    for name, (pattern, draw) in drawings.items():
        source = newest(folder, pattern)
        if source is None:
            print(f"{name}: no {pattern} in {folder}")
            continue
        draw(json.loads(source.read_text()), folder / name)
        print(f"written: {folder / name}, from {source.name}")


def newest(folder: Path, pattern: str) -> Path | None:
    """Return the last file by name, which begins with its date; None where there is none."""
    return max(folder.glob(pattern), default=None)


def draw_staleness(document: Document, output: Path) -> None:
    """Draw accuracy against measured staleness: a point per run, a line through each objective's means over seeds."""
    figure, axes = new_figure("measured staleness (optimizer steps)", "held-out accuracy after training")
    by_objective: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for run in document["runs"]:
        by_objective[run["cell"]["objective"]][run["cell"]["max_staleness"]].append(run)
    for color, (objective, by_bound) in zip(COLORS, by_objective.items(), strict=False):
        runs = [run for bound in sorted(by_bound) for run in by_bound[bound]]
        axes.plot(*columns(runs), "o", color=color, markersize=3, alpha=0.5)
        means = [
            {name: mean(run[name] for run in by_bound[bound]) for name in ("mean_staleness", "last_accuracy")}
            for bound in sorted(by_bound)
        ]
        axes.plot(*columns(means), color=color, label=document["titles"][objective])
    axes.legend(frameon=False)
    save(figure, output)


def columns(runs: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Return staleness and accuracy of runs."""
    return [run["mean_staleness"] for run in runs], [run["last_accuracy"] for run in runs]


def draw_soak(document: Document, output: Path) -> None:
    """Draw memory of all processes, and below it the bytes of objects in Ray's store, over time."""
    series = document["series"]
    minutes = [seconds / 60 for seconds in series["seconds"]]
    figure = Figure(figsize=INCHES, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    titles = {"actor_bytes": "actors", "driver_bytes": "driver", "ray_bytes": "Ray itself"}
    for color, (name, title) in zip(COLORS, titles.items(), strict=False):
        above.plot(minutes, [value / 1e6 for value in series[name]], color=color, label=title)
    below.plot(minutes, [value / 1e6 for value in series["store_bytes"]], color=COLORS[3])
    above.set_ylabel("memory (MB)")
    above.legend(frameon=False, ncols=3)
    below.set(xlabel="time (minutes)", ylabel="object store (MB)")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, output)


def draw_privileged_context(document: Document, output: Path) -> None:
    """Draw accuracy without context over the steps, on training and on held-out prompts: a line per arm and seed."""
    figure = Figure(figsize=INCHES, layout="constrained")
    parts = figure.subplots(1, 2, sharey=True)
    arms = list(dict.fromkeys(outcome["arm"] for outcome in document["outcomes"]))
    colors = dict(zip(arms, COLORS, strict=False))
    for axes, column, title in ((parts[0], 1, "training prompts"), (parts[1], 2, "held-out prompts")):
        for outcome in document["outcomes"]:
            steps, values = zip(*((point[0], point[column]) for point in outcome["curve"]), strict=True)
            axes.plot(steps, values, color=colors[outcome["arm"]], linewidth=1, alpha=0.7)
        axes.set(xlabel="optimizer steps", title=title, ylim=(0, 1.02))
        axes.spines[["top", "right"]].set_visible(False)
    parts[0].set_ylabel("right digits, without context")
    handles = [Patch(color=color, label=arm) for arm, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(arms), frameon=False)
    save(figure, output)


def draw_privileged_sampling(document: Document, output: Path) -> None:
    """Draw pass rates on held-out prompts over the sampled tokens: a panel per set, a line per arm and seed."""
    figure = Figure(figsize=INCHES, layout="constrained")
    trained = {outcome["set"] for outcome in document["outcomes"]}
    panels = [("hard", "hard"), ("dense", "dense"), ("both", "hard"), ("both", "dense")]  # trained on, measured on
    panels = [panel for panel in panels if panel[0] in trained]
    parts = figure.subplots(1, len(panels), sharey=True)
    arms = list(dict.fromkeys(outcome["arm"] for outcome in document["outcomes"]))
    colors = dict(zip(arms, COLORS, strict=False))
    for axes, (name, on) in zip(parts, panels, strict=True):
        for outcome in (one for one in document["outcomes"] if one["set"] == name):
            tokens, values = zip(*outcome["curves"][on], strict=True)
            axes.plot([count / 1000 for count in tokens], values, color=colors[outcome["arm"]], linewidth=1, alpha=0.7)
        axes.set(xlabel="thousand tokens", ylim=(-0.02, 1.02))
        axes.set_title(on if name == on else f"both: {on}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    parts[0].set_ylabel("held-out pass rate, no hint")
    handles = [Patch(color=color, label=arm) for arm, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(arms), frameon=False)
    save(figure, output)


def draw_end_to_end(document: Document, output: Path) -> None:
    """Draw the tokens per second of the rows that are named END_TO_END and something."""
    rows = [found for found in document["rows"] if found["name"].startswith(END_TO_END) and found["unit"] == "tokens/s"]
    draw_bars([{**found, "name": found["name"].removeprefix(END_TO_END)} for found in rows], output)


def draw_bars(rows: Sequence[Row], output: Path) -> None:
    """Draw one group of bars per size, each on a scale of its own, and in it one bar per name with its value above.

    All rows have one unit.
    """
    (unit,) = {found["unit"] for found in rows}
    sizes, names = (list(dict.fromkeys(found[key] for found in rows)) for key in ("size", "name"))
    colors = dict(zip(names, cycle(COLORS), strict=False))
    figure = Figure(figsize=INCHES, layout="constrained")
    groups = figure.subplots(1, len(sizes), squeeze=False)[0]
    for axes, size in zip(groups, sizes, strict=True):
        for position, found in enumerate(one for one in rows if one["size"] == size):
            bar = axes.bar(position, found["value"], color=colors[found["name"]])
            axes.bar_label(bar, fmt="{:,.0f}", fontsize=8)
        axes.set_xticks([])
        axes.set_xlabel(fill(size, width=LABEL_CHARACTERS // len(sizes)), fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    groups[0].set_ylabel(unit)
    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    save(figure, output)


def new_figure(horizontal: str, vertical: str) -> tuple[Figure, Axes]:
    """Return a figure with one plot, its axes named."""
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=horizontal, ylabel=vertical)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, output: Path) -> None:
    """Write a PNG without the date and version that would change it every time."""
    figure.savefig(output, dpi=DOTS_PER_INCH, metadata={"Software": None})


if __name__ == "__main__":
    main()
