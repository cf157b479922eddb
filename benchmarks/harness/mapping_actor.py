"""The receiving end of a weight sync without vLLM: an actor, and a process beside it that maps and checks buckets."""

import multiprocessing
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import ray

from cluster.vllm.weight_sync.shared_memory import mappable
from cluster.weight_sync.manifest import new_digest


class MappingActor:
    """Receives as a rollout actor does; beside it a process maps and checks, and loads nothing."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=check_buckets, args=(theirs,), daemon=True)
        self._process.start()
        self._buffers: list[Any] = []

    def start_weight_update(self, first: Sequence[Any]) -> None:
        """Begin."""
        self._buffers.clear()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Have the process map and check one bucket."""
        self._buffers.append(ray.get(update_info["reference"][0]))
        with mappable(self._buffers[-1]) as region:
            self._pipe.send(asdict(region))
            if self._pipe.recv() != update_info["checksum"]:
                raise RuntimeError("other bytes arrived than were sent")

    def finish_weight_update(self, policy_version: int) -> str:
        """Return the checksum of all buckets."""
        self._pipe.send(None)
        return str(self._pipe.recv())


def check_buckets(pipe: Connection) -> None:
    """Answer each bucket with the checksum to its end; after None begin anew. Ends when the other end is gone."""
    from cluster.vllm.weight_sync.object_store import BucketMessage, map_memory

    digest = new_digest()
    with suppress(EOFError):
        while True:
            region = pipe.recv()
            if region is not None:
                digest.update(map_memory(BucketMessage([], [], [], "", **region)).data)
            pipe.send(digest.hexdigest())
            if region is None:
                digest = new_digest()
