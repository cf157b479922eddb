"""Makes what the loop and the hooks of a run share, with defaults."""

from threading import Event
from typing import Any

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.monitoring.alarms import LengthCap
from cluster.monitoring.sinks import PlainView
from cluster.run.hooks import RunContext
from cluster.run.inputs import Inputs
from cluster.run.ledger import Ledger
from cluster.run.probe import Probe
from cluster.run.summary import RunSummary


def make_run_context(
    config: Config,
    inputs: Inputs,
    pipeline: Any,
    directory: RunDirectory,
    first_step: int = 0,
    history: RunSummary | None = None,
) -> RunContext:
    """Build what a run's hooks share, as the supervisor does."""
    return RunContext(
        config,
        inputs,
        pipeline,
        directory,
        PlainView(),
        first_step,
        history or RunSummary(),
        Ledger(directory.ledger, first_step),
        LengthCap(config.rollout.max_completion_tokens, config.rollout.max_staleness, config.rollout.horizon),
        Probe(),
        Event(),
    )
