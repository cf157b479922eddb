"""Lets a teacher's pool be replaced by one of another checkpoint while a run goes on.

The new pool starts beside the others. From a step on it gets all batches of that step and later ones; those of earlier
steps stay with the pool that they began with, which is retired when no step needs it.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import PreceptorError
from teacher_workers.pool import TeacherPool, TeacherReplicas
from teacher_workers.router import TeacherRouter


@dataclass
class Replacement:
    """Holds pools that are to replace those of the same names, or were replaced; they share their replicas."""

    pools: Mapping[str, TeacherPool]
    waits_for_place: bool = False  # whether the cluster cannot hold them beside the others
    num_borrowed: int = 0  # workers of the others that left to make a place for the first of these
    error: PreceptorError | None = None  # why they cannot serve
    due: float = math.inf  # on the driver's clock: when they are given up unless one of them serves
    until_step: int = 0  # of pools that were replaced: first step that is not theirs

    @property
    def replicas(self) -> TeacherReplicas:
        return next(iter(self.pools.values())).replicas


class ReplaceableTeachers(TeacherRouter):
    """Routes the batches of each step to the pools that score it."""

    def __init__(self, pools: Mapping[str, TeacherPool], call_seconds: float) -> None:
        super().__init__(pools, call_seconds)
        self._retired: list[Replacement] = []  # in the order in which they were replaced
        self.replacements: list[Replacement] = []  # prepared, neither cancelled nor switched to

    def prepare(self, replacement: Replacement) -> None:
        """Start to maintain pools that are to replace others; their failure is noted there and ends nothing."""
        self.replacements.append(replacement)

    def cancel(self, replacement: Replacement) -> None:
        """End pools that were to replace others, which get back the workers that they gave."""
        self.replacements.remove(replacement)
        replacement.replicas.end()
        current = self.pools[next(iter(replacement.pools))]
        current.resize(current.size + replacement.num_borrowed)

    def switch(self, replacement: Replacement, first_step: int) -> None:
        """Let pools replace those of the same names, from a step on that nothing was requested for yet."""
        retired = Replacement({name: self.pools[name] for name in replacement.pools}, until_step=first_step)
        self._retired.append(retired)
        # The pools may have been scaled meanwhile.
        replacement.replicas.resize(retired.replicas.size + replacement.num_borrowed)
        self.pools.update(replacement.pools)
        self.replacements.remove(replacement)

    def close(self, next_step: int) -> None:
        """Let the replicas leave that only steps before `next_step` may need, which are learned from."""
        for retired in self._retired:
            if retired.until_step <= next_step and retired.replicas.size:
                retired.replicas.resize(0)

    def maintain(self) -> list[Any]:
        """Do as TeacherRouter does, and maintain the pools that are to replace others."""
        references = super().maintain()
        for replacement in self.replacements:
            try:
                if not replacement.error:
                    replacement.replicas.maintain()
                    references += replacement.replicas.arriving
            except PreceptorError as error:
                replacement.error = error
        self._retired = [retired for retired in self._retired if not retired.replicas.is_gone]
        return references

    def collect(self, ready: Collection[Any]) -> list[BatchHandle]:
        """Do as TeacherRouter does, and let the replicas serve that have started."""
        finished = super().collect(ready)
        for replacement in self.replacements:
            try:
                if not replacement.error:
                    replacement.replicas.admit_started(ready)
            except PreceptorError as error:
                replacement.error = error
        return finished

    def abandon(self) -> None:
        """Forget all batches that are being scored; steps that are done again belong to the current pools."""
        super().abandon()
        for retired in self._retired:
            retired.until_step = 0
        self.close(next_step=0)

    def shutdown(self) -> None:
        for replacement in self.replacements:
            replacement.replicas.end()
        super().shutdown()

    def _pool(self, name: str, step: int) -> TeacherPool:
        for retired in self._retired:
            if name in retired.pools and 0 <= step < retired.until_step:
                return retired.pools[name]
        return self.pools[name]

    def _all_pools(self) -> list[TeacherPool]:
        return [*self.pools.values(), *(pool for retired in self._retired for pool in retired.pools.values())]
