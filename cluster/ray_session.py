"""Connects to a Ray cluster, or starts a local one for the length of the run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from cluster.contracts.config import Config
from cluster.contracts.errors import PlacementError

LOCAL_OBJECT_STORE_BYTES = 1 << 30  # a step's trajectories and one copy of the weights; Ray spills the rest to disk


@dataclass(frozen=True)
class RaySession:
    """A live connection."""

    dashboard_address: str | None  # host:port
    is_local: bool


@contextmanager
def ray_session(config: Config) -> Iterator[RaySession]:
    """Connect for the length of a `with` statement; a local cluster ends with it.

    Raises:
        PlacementError: no cluster answers at the configured address.
    """
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    common = {"namespace": f"preceptor-{config.run.name}", "log_to_driver": False, "logging_level": "ERROR"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would otherwise hide all GPUs from actors that ask for none and warn about it on every start.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if address is None:
            context = ray.init(
                address="local",  # without it, Ray would join any cluster that it finds on this machine
                include_dashboard=config.ray.dashboard,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                **common,
            )
        else:
            context = ray.init(address=address, **common)
    except ConnectionError as error:
        raise PlacementError(f"ray.address '{address}': no Ray cluster answers there: {error}") from error
    try:
        yield RaySession(context.dashboard_url or None, is_local=address is None)
    finally:
        ray.shutdown()
