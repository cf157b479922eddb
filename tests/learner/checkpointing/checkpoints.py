"""Checkpoints as a run of two ranks writes them, without the ranks."""

from pathlib import Path
from typing import Any

import torch

from learner.checkpointing import checkpoint
from learner.checkpointing.manifest import Layout, shard_name
from learner.checkpointing.shards import write_shard

LAYOUT = Layout(num_ranks=2, zero_stage=2)


def run_state(step: int) -> dict[str, Any]:
    """Return the driver's part of a run without held-out prompts."""
    history = {"teacher_accuracy": {"main": 0.5}, "last_kl": 0.25, "first_sample": {"prompt": "p"}}
    return {"step": step, "history": history, "ledger": {"checksum": "0" * 32, "in_flight": [step + 1]}}


def write_checkpoint(directory: Path, step: int, state: Any = None, layout: Layout = LAYOUT) -> Path:
    """Write a checkpoint through the functions that the program uses."""
    folder = checkpoint.step_folder(directory, step)
    partial = checkpoint.begin(folder)
    tensors = {"0.weights": torch.arange(6.0), "0.step": torch.tensor(float(step))}
    shards = [write_shard(partial / shard_name(rank), tensors) for rank in range(layout.num_ranks)]
    checkpoint.commit(folder, run_state(step) if state is None else state, layout, shards)
    return folder
