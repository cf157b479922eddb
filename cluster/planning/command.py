"""`preceptor plan`: how long a run's steps are going to take on how many GPUs, before anything is bought or started."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.contracts.config import Config
from cluster.contracts.errors import ConfigError
from cluster.planning.demand import Demand
from cluster.planning.measured_rates import rates_of_run
from cluster.planning.rates import Rates, check_rates, read_rates
from cluster.planning.report import Report
from cluster.planning.search import PREDICTED_STEPS, Widths, find_split
from cluster.planning.simulated_run import Split, simulate


@dataclass(frozen=True)
class PlanOptions:
    """What the command line asks for."""

    rates: Path  # a rates file, or the directory of a run that is over
    num_gpus: int | None  # None: predict the run file's own sizes only
    picture: Path | None
    save_rates: Path | None
    as_json: bool


def print_plan(config: Config, options: PlanOptions) -> None:
    """Predict the run file's sizes, look for better ones, and print what was found.

    Raises:
        ConfigError: the rates are missing, malformed or of another run, or the GPUs are too few.
        CheckpointError: the directory holds no run.
    """
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
    """Check that every pool has workers and hardware of its own, as those of a plan have.

    Raises:
        ConfigError: one has not.
    """
    for name, teacher in config.teachers.items():
        if not teacher.num_workers:
            raise ConfigError(
                f"teachers.{name}: num_workers = 0 scores nothing, so no step of a plan would end; "
                f"plan with teachers.{name}.num_workers=1"
            )
    for first, *others in config.scorer_groups.values():
        if others:
            raise ConfigError(
                f"teachers.{first} and teachers.{others[0]} take turns in the slot '{config.teachers[first].slot}', "
                f"which a plan knows nothing of; plan with teachers.{others[0]}.slot of another name"
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
