"""Predicts for `preceptor plan` how long a run's steps take on how many GPUs, before any is bought or started."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cluster.config.run_config import Config
from cluster.contracts.errors import ConfigError
from cluster.simulation.measured_rates import rates_of_run
from cluster.simulation.rates import Rates, check_rates, read_rates
from cluster.simulation.search import PREDICTED_STEPS, Plan, Widths, find_split
from cluster.simulation.simulated_run import Demand, Prediction, Split, simulate

SHOWN_ALTERNATIVES = 5
COLORS = ("#4477aa", "#ee6677", "#228833")  # distinct for colour-blind readers too
INCHES, DOTS_PER_INCH = (9.0, 3.6), 120


@dataclass(frozen=True)
class Report:
    """Shows a plan as text, JSON or picture."""

    widths: Widths
    as_written: Prediction  # the sizes of the run file
    plan: Plan | None  # None: no number of GPUs was given

    @property
    def named(self) -> dict[str, Prediction]:
        """Return what is predicted of the whole run, by the name that is shown."""
        return {"run file": self.as_written} | ({"best": self.plan.best} if self.plan else {})

    def lines(self) -> list[str]:
        lines = []
        for name, predicted in self.named.items():
            num_gpus = sum(self.widths.gpus_of(predicted.split).values())
            lines.append(f"{name}: {predicted.split} ({num_gpus} GPUs)")
            tokens_per_second = f"{predicted.completion_tokens_per_second:,.0f} completion tokens/s"
            lines.append(f"  step {predicted.mean_step_seconds:.4g} s, {tokens_per_second}")
            idle = (f"{pool} {share:.0%}" for pool, share in predicted.idle_shares.items())
            lines.append(f"  idle: {', '.join(idle)}")
        if self.plan:
            scale = "" if self.plan.scale == 1 else f", in runs {self.plan.scale} times smaller"
            lines.append(f"splits tried: {len(self.plan.tried)}{scale}; the best of them:")
            best = sorted(self.plan.tried, key=lambda predicted: predicted.mean_step_seconds)[:SHOWN_ALTERNATIVES]
            lines += [f"  {predicted.mean_step_seconds:10.4g} s  {predicted.split}" for predicted in best]
        return lines

    def as_json(self) -> dict[str, Any]:
        return {
            name.replace(" ", "_"): {
                "workers": predicted.split.sizes,
                "gpus": self.widths.gpus_of(predicted.split),
                "step_seconds": predicted.mean_step_seconds,
                "completion_tokens_per_second": predicted.completion_tokens_per_second,
                "idle_shares": dict(predicted.idle_shares),
            }
            for name, predicted in self.named.items()
        }

    def draw(self, output: Path) -> None:
        """Draw idle shares and the step's seconds of every split tried; raise ConfigError where that cannot be."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError(f"--picture {output}: drawing needs matplotlib; pip install matplotlib") from error
        picture = Figure(figsize=INCHES, layout="constrained")
        left, right = picture.subplots(1, 2)
        self._draw_idle(left)
        self._draw_tried(right)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        try:
            picture.savefig(output, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
        except OSError as error:
            raise ConfigError(f"--picture {output}: cannot write the picture: {error.strerror}") from error

    def _draw_idle(self, axes: Any) -> None:
        pools = list(self.as_written.idle_shares)
        width = 0.8 / len(self.named)
        for position, (name, predicted) in enumerate(self.named.items()):
            at = [index + position * width for index in range(len(pools))]
            shares = [100 * predicted.idle_shares[pool] for pool in pools]
            label = f"{name}: {predicted.mean_step_seconds:.3g} s per step"
            axes.bar(at, shares, width, color=COLORS[position], label=label)
        axes.set_xticks([index + 0.4 - width / 2 for index in range(len(pools))], pools, fontsize=8)
        axes.set(ylabel="idle (%)", ylim=(0, 100))
        axes.legend(frameon=False, fontsize=8)

    def _draw_tried(self, axes: Any) -> None:
        axes.set(xlabel="GPUs of the rollout pool (%)", ylabel="seconds of a step")
        if self.plan is None:
            return
        self._scatter(axes, self.plan.tried, COLORS[0], "tried")
        best = self.plan.best
        self._scatter(axes, [best], COLORS[1], f"best: {best.split}")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=7)

    def _scatter(self, axes: Any, predictions: Sequence[Prediction], color: str, label: str) -> None:
        gpus = [self.widths.gpus_of(one.split) for one in predictions]
        shares = [100 * of_pools["rollout"] / sum(of_pools.values()) for of_pools in gpus]
        axes.plot(shares, [one.mean_step_seconds for one in predictions], "o", color=color, markersize=4, label=label)


@dataclass(frozen=True)
class PlanOptions:
    """Holds the options of the command line."""

    rates: Path  # a rates file, or the directory of a run that is over
    num_gpus: int | None  # None: predict the run file's own sizes only
    picture: Path | None
    save_rates: Path | None
    as_json: bool


def print_plan(config: Config, options: PlanOptions) -> None:
    """Predict the run file's sizes, look for better ones, and print both."""
    check_pools(config)
    rates = load_rates(options.rates, config)
    if options.save_rates is not None:
        _write(options.save_rates, msgspec.json.format(msgspec.json.encode(rates), indent=1))
    written = simulate(config, rates, written_split(config), Demand(config, rates), PREDICTED_STEPS)
    plan = None if options.num_gpus is None else find_split(config, rates, options.num_gpus)
    report = Report(Widths.of(config), written, plan)
    text = json.dumps(report.as_json(), indent=1) if options.as_json else "\n".join(report.lines())
    sys.stdout.write(f"{text}\n")
    if options.picture is not None:
        report.draw(options.picture)


def check_pools(config: Config) -> None:
    """Raise ConfigError if a pool has no workers or hardware of its own, as those of a plan have."""
    for name, teacher in config.teachers.items():
        if not teacher.num_workers:
            raise ConfigError(
                f"teachers.{name}: num_workers = 0 scores nothing, so no step of a plan would end; "
                f"plan with teachers.{name}.num_workers=1"
            )
    if config.sampling_teacher is not None:
        raise ConfigError(
            f"teachers.{config.sampling_teacher} writes for hard prompts, whose number nothing predicts; plan without "
            "rollout.privileged.sampler"
        )
    for first, *others in config.scorer_groups.values():
        if others:
            raise ConfigError(
                f"teachers.{first} and teachers.{others[0]} take turns in the slot '{config.teachers[first].slot}', "
                f"which a plan does not simulate; plan with teachers.{others[0]}.slot of another name"
            )
    if config.ray.share_gpu:
        raise ConfigError("ray.share_gpu: a plan gives every pool GPUs of its own; plan with ray.share_gpu=false")


def load_rates(path: Path, config: Config) -> Rates:
    """Read a rates file, or read the rates off the run whose directory it is."""
    if not path.is_dir():
        return read_rates(path, config)
    rates = rates_of_run(path)
    check_rates(rates, config, str(path))
    return rates


def written_split(config: Config) -> Split:
    """Return the sizes that the run file gives."""
    teachers = {name: teacher.num_workers for name, teacher in config.teachers.items()}
    return Split(config.rollout.num_workers, teachers, config.learner.num_workers)


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content + b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the rates: {error.strerror}") from error
