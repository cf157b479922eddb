"""How much memory a local Ray cluster and its driver hold: the heaps of processes, and what is in the object store."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np
import psutil
import ray
from ray._private import internal_api  # `ray memory` prints these figures; there is no public call for them

from benchmarks.harness.process_trees import descendants

RAY_ITSELF = ("raylet", "gcs_server", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::IDLE", "python")
SLOPE_SECONDS = 600.0


@dataclass(frozen=True)
class MemorySample:
    """One moment.

    Of processes, their heaps: pages of no file and not of the object store, those shared after a fork counted once.
    (Pages of files, shared with processes of other programs, would say what those do.)
    """

    seconds: float  # since the sampler was built
    driver_bytes: int
    actor_bytes: int
    ray_bytes: int  # raylet, GCS, agents
    mapped_store_bytes: int  # pages of the object store that were ever touched: freed ones are used again, not returned
    store_bytes: int  # of objects that somebody still refers to
    store_objects: int

    @property
    def heap_bytes(self) -> int:
        """Return the heaps of all processes."""
        return self.driver_bytes + self.actor_bytes + self.ray_bytes


@dataclass
class MemorySampler:
    """Measures this process, which is the driver, and everything that it started."""

    started: float = field(default_factory=perf_counter)

    def __post_init__(self) -> None:
        """Connect to the cluster's own statistics."""
        self._state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)

    def sample(self) -> MemorySample:
        """Return the present figures."""
        own = {"driver": 0, "actor": 0, "ray": 0}
        shared = 0
        for process in descendants(os.getpid()):
            try:
                name = process.name()
                heap, of_store = _page_bytes(process.pid)
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
            kind = "driver" if process.pid == os.getpid() else "ray" if name.startswith(RAY_ITSELF) else "actor"
            own[kind] += heap
            shared += of_store
        store = internal_api.get_memory_info_reply(self._state).store_stats
        return MemorySample(
            seconds=perf_counter() - self.started,
            driver_bytes=own["driver"],
            actor_bytes=own["actor"],
            ray_bytes=own["ray"],
            mapped_store_bytes=shared,
            store_bytes=store.object_store_bytes_used,
            store_objects=store.num_local_objects,
        )


def growth_per_ten_minutes(seconds: list[float], values: list[int]) -> float:
    """Return the slope of the best line through the values.

    Example:
        >>> round(growth_per_ten_minutes([0, 60, 120], [100, 106, 112]), 6)
        60.0
    """
    return float(np.polyfit(seconds, values, 1)[0]) * SLOPE_SECONDS


def _page_bytes(pid: int) -> tuple[int, int]:
    """Return a process's share of pages without a file, and of shared memory."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return kilobytes["Pss_Anon"] * 1024, kilobytes["Pss_Shmem"] * 1024
