"""How much memory a local Ray cluster and its driver hold: each process's own, and what is in the object store."""

from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np
import psutil  # type: ignore[import-untyped]
import ray
from ray._private import internal_api  # `ray memory` prints these figures; there is no public call for them

RAY_ITSELF = ("raylet", "gcs_server", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::IDLE", "python")
SLOPE_SECONDS = 600.0


@dataclass(frozen=True)
class MemorySample:
    """One moment. Shared pages count once; those of the object store are in no process's figure."""

    seconds: float  # since the sampler was built
    driver_bytes: int
    actor_bytes: int
    ray_bytes: int  # raylet, GCS, agents
    mapped_store_bytes: int  # pages of the object store that were ever touched: freed ones are used again, not returned
    store_bytes: int  # of objects that somebody still refers to
    store_objects: int

    @property
    def process_bytes(self) -> int:
        """Return what all processes hold themselves."""
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
        driver = psutil.Process()
        own = {"driver": 0, "actor": 0, "ray": 0}
        shared = 0
        for process in [driver, *driver.children(recursive=True)]:
            try:
                name = process.name()
                proportional, of_store = _proportional_bytes(process.pid)
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
            kind = "driver" if process == driver else "ray" if name.startswith(RAY_ITSELF) else "actor"
            own[kind] += proportional - of_store
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


def _proportional_bytes(pid: int) -> tuple[int, int]:
    """Return a process's share of its pages, and how much of it is shared memory."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return kilobytes["Pss"] * 1024, kilobytes["Pss_Shmem"] * 1024
