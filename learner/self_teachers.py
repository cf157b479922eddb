"""Holds the weights of teachers that are the student itself, on one rank of the learner, and sends them to their pools.

They are kept here and not at the workers: in bfloat16, a step of a moving average is mostly below half the distance to
the next value, and would be lost in rounding.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from ray.actor import ActorHandle
from torch import Tensor

from cluster.config.run_config import Config
from cluster.config.stages import RefreshConfig
from cluster.contracts.errors import CheckpointError
from cluster.models.lm_head import LmHead
from cluster.weight_sync.manifest import WeightSyncReport
from learner.checkpointing.shards import host_copy
from learner.engines.base import TrainEngine
from learner.weight_sync.object_store import ObjectStoreSender

PREFIX = "teacher."  # of the names in a shard, which end in a position


class SelfTeachers:
    """Keeps what each teacher has, in float32, as the engine's masters are cut; one that is `live` has the student's.

    Methods are collective, unless they say otherwise.
    """

    def __init__(self, engine: TrainEngine, config: Config) -> None:
        """Begin with the student's present weights for every teacher whose weights are to change."""
        self._engine = engine
        refreshed = {name: teacher for name, teacher in config.teachers.items() if teacher.receives_weights}
        refreshes = {name: teacher.refresh for name, teacher in refreshed.items()}
        self._ema = {name: one.ema for name, one in refreshes.items() if isinstance(one, RefreshConfig) and one.ema}
        self._kept = {
            name: [master.detach().clone() for master in engine.masters()]
            for name, refresh in refreshes.items()
            if isinstance(refresh, RefreshConfig)
        }
        self._senders = {
            name: ObjectStoreSender(
                engine, config.weight_sync, teacher.engine.dtype, config.ray.call_timeout_seconds, f"teacher {name}"
            )
            for name, teacher in refreshed.items()
        }

    @torch.no_grad()
    def average(self) -> None:
        """Move every average by ema * (student - average), after an optimizer step; not collective."""
        for name, ema in self._ema.items():
            for kept, master in zip(self._kept[name], self._engine.masters(), strict=True):
                kept.lerp_(master, ema)

    @torch.no_grad()
    def take(self, name: str) -> None:
        """Give a teacher that is neither live nor an average the student's present weights; not collective."""
        if name not in self._ema:
            for kept, master in zip(self._kept.get(name, ()), self._engine.masters(), strict=False):
                kept.copy_(master)

    def publish(self, name: str, workers: Sequence[ActorHandle], version: int) -> WeightSyncReport:
        """Bring a teacher's weights, as `version`, to these workers of its pool; rank 0's report is the group's."""
        with self.weights_of(name):
            return self._senders[name].publish(workers, version)

    def head_of(self, name: str, head: LmHead) -> LmHead:
        """Return a teacher's LM head with its present weights."""
        tensors = [one.name for one in self._engine.student.manifest("float32") if head.own_name(one.name)]
        with self.weights_of(name), self._engine.full_parameters(tensors) as parameters:
            return head.updated(parameters)

    def weights_of(self, name: str) -> AbstractContextManager[None]:
        """Let the student have a teacher's weights while the context lasts, in which it is only read."""
        return self._engine.holding(self._kept[name]) if name in self._kept else nullcontext()

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy, in host memory, of this rank's part of all that is kept; not collective."""
        return host_copy({name: part for teacher in self._kept for name, part in self._named(teacher).items()})

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Go back to a snapshot among other tensors, and return the others; not collective.

        Raises:
            CheckpointError: it is of other teachers or of another student.
        """
        left = dict(state)
        for teacher in self._kept:
            for name, part in self._named(teacher).items():
                saved = left.pop(name, None)
                if saved is None or saved.shape != part.shape:
                    raise CheckpointError(
                        f"a shard lacks the weights of teachers.{teacher}; resume with the student and the refresh "
                        "that the run was started with"
                    )
                part.copy_(saved)
        return left

    def _named(self, teacher: str) -> dict[str, Tensor]:
        return {f"{PREFIX}{teacher}.{position}": part for position, part in enumerate(self._kept[teacher])}
