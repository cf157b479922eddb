"""A pool for audits, on actors; modules of their own, so that Ray can import them."""

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from cluster.actors.object_store import pack
from cluster.contracts.batches import BatchHandle
from cluster.contracts.pieces import Pieces
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.wire import from_wire


class Stage:
    """Runs any number of real TeacherWorkers on wrong and right engines, each for one replica."""

    def __init__(self) -> None:
        self._workers: dict[str, Any] = {}

    async def score(self, name: str, engine: str, wire: Any, request: ScoreRequest) -> tuple[Pieces, BatchHandle]:
        """Score as replica `name`, whose engine is a class of `faulty_engines`, `silent` or `dying`.

        It may be followed by `:SEED` and by `@VERSION` of its weights.
        """
        from tests.teacher_workers import faulty_engines

        if engine == "dying":
            os._exit(1)
        if engine == "silent":
            await asyncio.sleep(1000)
        if (name, engine) not in self._workers:
            described, _, version = engine.partition("@")
            kind, _, seed = described.partition(":")
            self._workers[name, engine] = faulty_engines.make_worker(
                name, getattr(faulty_engines, kind)("float32", int(seed or 0))
            )
            await self._workers[name, engine].weights.finish_weight_update(int(version or 0))
        return pack(*await self._workers[name, engine].score(from_wire(wire), request))


class StagedPool:
    """A pool for audits whose replicas' engines are named in a mapping that a test may change."""

    def __init__(self, stage: Any, engines: dict[str, str]) -> None:
        self._stage = stage
        self.engines = engines
        self.fenced: dict[str, str] = {}

    def serving(self) -> Mapping[int, str]:
        return {index: name for index, name in enumerate(self.engines) if name not in self.fenced}

    def ask(self, replica: int, handle: BatchHandle, request: ScoreRequest) -> tuple[Any, Any]:
        name = self.serving()[replica]
        asked = self._stage.score.options(num_returns=2).remote(name, self.engines[name], handle.reference, request)
        return asked[0], asked[1]

    def quarantine(self, replica: int, reason: str) -> None:
        self.fenced[self.serving()[replica]] = reason
