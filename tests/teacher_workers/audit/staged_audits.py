"""Audits of replicas that run real teacher workers in an actor, on engines that are right or wrong."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from cluster.actors.object_store import pack
from cluster.config.run_config import Config
from cluster.contracts.batches import BatchHandle
from cluster.contracts.trajectory import make_generated
from teacher_workers.audit.runner import ScoreAudit
from tests.builders import make_trajectory
from tests.teacher_workers.audited_actors import StagedPool

ZERO, ONE, TWO = "teacher-main-0", "teacher-main-1", "teacher-main-2"


def handles() -> list[BatchHandle]:
    draw = np.random.default_rng(0)
    found = []
    for length in (40, 12, 20, 16, 30):
        row = make_trajectory((1, 2), draw.integers(4, 112, length))
        wire, handle = pack(make_generated([row]), {})
        found.append(replace(handle, reference=ray.put(wire)))
    return found


def start(config: Config, pool: StagedPool, folder: Path, step: int = 0, **options: Any) -> ScoreAudit:
    """Begin the first audit."""
    audit = ScoreAudit(config, {"main": pool}, folder, **options)
    if audit.needs_rows:
        audit.take_rows(handles())
    assert audit.is_due(step)
    audit.begin(step)
    return audit


def right(stage: Any, *names: str) -> StagedPool:
    return StagedPool(stage, dict.fromkeys(names, "RightEngine"))
