"""Trains a tiny student from a tiny teacher that ship with the package, through the same driver as any other run."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config.run_config import Config
from cluster.config.run_file import load_run_config
from cluster.nodes.preloaded_python import preloading

if TYPE_CHECKING:
    from cluster.run.summary import RunSummary

EMBEDDED = Path(__file__).parent / "embedded"


def embedded_config(overrides: Sequence[str] = ()) -> Config:
    """Return the run file beside the embedded models, its paths made absolute."""
    paths = [
        f"student.model={EMBEDDED / 'student'}",
        f"teachers.countdown.model={EMBEDDED / 'teacher'}",
        f"prompts.train={EMBEDDED / 'train.jsonl'}",
        f"prompts.held_out={EMBEDDED / 'held_out.jsonl'}",
    ]
    return load_run_config(EMBEDDED / "demo.toml", [*paths, *overrides])


def run_demo(overrides: Sequence[str] = ()) -> "RunSummary":
    """Train the embedded student in a run directory of its own."""
    name = f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    config = embedded_config([f"run.name={name}", *overrides])
    with preloading(config):
        # Here, because a caller that needs the configuration alone may have neither Ray nor vLLM installed.
        from cluster.commands import start_training

        return start_training(config)
