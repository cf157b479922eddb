"""Connects to a Ray cluster, or starts a local one for the length of the run."""

import logging
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stub is not complete
from ray.exceptions import AuthenticationError, RpcError

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import PlacementError
from cluster.monitoring.status_file import change_status, read_status
from cluster.nodes.interruption import interrupt_on_sigterm
from cluster.nodes.local_cluster import LOOPBACK, local_cluster, on_loopback, private_umask
from cluster.nodes.reaper import SHARED_MEMORY
from cluster.placement.gpus import visible_gpus

# Ray's own patience. The owner of a cluster whose head may come back sets it higher.
RAY_PATIENCE, RAY_SECONDS = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0
SOONER = 0.75  # than Ray, which would end the driver first


@dataclass(frozen=True)
class Patience:
    """Holds how often a head is checked, and how long it may be silent."""

    check_seconds: float = 5.0  # between two checks, and for one
    silent_seconds: float = field(default_factory=lambda: SOONER * float(os.environ.get(RAY_PATIENCE) or RAY_SECONDS))


@contextmanager
def watch_head(address: str, give_up: Callable[[float], None], patience: Patience | None = None) -> Iterator[None]:
    """Check in a thread that the address of Ray's GCS takes connections, while the context lasts.

    The thread calls `give_up` once, with the seconds of silence.
    """
    over = threading.Event()
    arguments = (address, give_up, patience or Patience(), over)
    thread = threading.Thread(target=_watch, args=arguments, name="head", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()  # without waiting for the thread: a check of a head that is gone takes seconds


def end_run(config: Config, address: str, silent_seconds: float) -> None:
    """Say that the run ends because its head is gone, and end this process before Ray does."""
    directory = RunDirectory(Path(config.run.directory) / config.run.name)
    status = read_status(directory.status)
    is_training = status is not None and status.pid == os.getpid()
    resume = f", and go on with preceptor train --resume {directory.path}" if is_training else ""
    sentence = (
        f"the head of the Ray cluster has not answered at {address} for {silent_seconds:.0f} s, and nothing can go on "
        f"without it; start the cluster again{resume}"
    )
    if is_training:
        with suppress(OSError):  # its disk may have gone with the head, and the sentence is what counts
            change_status(directory.status, state="failed", error=sentence)
    sys.stderr.write(f"preceptor: {sentence}\n")
    sys.stderr.flush()
    os._exit(1)  # an orderly end would wait for the head


def _watch(address: str, give_up: Callable[[float], None], patience: Patience, over: threading.Event) -> None:
    heard = time.monotonic()
    while not over.wait(patience.check_seconds):
        try:
            _connect(address, patience.check_seconds)
            heard = time.monotonic()
        except OSError:
            if (silent := time.monotonic() - heard) >= patience.silent_seconds and not over.is_set():
                give_up(silent)
                return


def _connect(address: str, seconds: float) -> None:
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), seconds).close()


LOCAL_OBJECT_STORE_BYTES = 1 << 30  # a step's trajectories and one copy of the weights; Ray spills the rest to disk
# Of memory, where there are GPUs: hidden states of a model 4,096 wide take 8 KB a token, 1 GiB for 128 thousand. Ray's
# own share, too; shared memory must hold it, with some left for others.
OBJECT_STORE_SHARE, SHARED_MEMORY_SHARE = 0.3, 0.9
CONNECT_SECONDS = 10.0
TOKEN_ADVICE = (
    "set RAY_AUTH_MODE=token and give the cluster's own token in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH "
    "names, or in ~/.ray/auth_token"
)
VERSION_MISMATCH = "Version mismatch: "  # how Ray begins the error of a driver that is not like the cluster

_log = logging.getLogger("preceptor")


@dataclass(frozen=True)
class RaySession:
    """Holds a live connection."""

    dashboard_address: str | None  # host:port
    token_file: Path | None = None  # the dashboard asks for it; None: the user's own token, or none


@contextmanager
def ray_session(config: Config) -> Iterator[RaySession]:
    """Connect for the length of a `with` statement; a local cluster ends with it.

    Files that this process writes meanwhile can be read by their owner only.

    Raises:
        PlacementError: no cluster answers at the configured address, or it does not take the token.
    """
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    common = {"namespace": f"preceptor-{config.run.name}", "log_to_driver": False, "logging_level": "ERROR"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would otherwise hide all GPUs from actors that ask for none and warn about it on every start.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is not None:
        with _joined(address, common) as session, _watched_head(config):
            yield session
        return
    store_bytes = object_store_bytes(SHARED_MEMORY, bool(visible_gpus()))
    if warning := shared_memory_warning(SHARED_MEMORY, store_bytes):
        _log.warning("%s", warning)
    try:
        with (
            local_cluster(
                one_gpu=config.ray.share_gpu,
                include_dashboard=config.ray.dashboard,
                dashboard_host=config.ray.dashboard_host,
                object_store_memory=store_bytes,
                **common,
            ) as cluster,
            interrupt_on_sigterm(),
            _watched_head(config),
        ):
            yield RaySession(cluster.dashboard_address, cluster.token_file)
    except AuthenticationError as error:
        reason = str(error).split(". ")[0]
        raise PlacementError(f"the token for the local Ray cluster cannot be used: {reason}") from error


def object_store_bytes(folder: Path, has_gpus: bool, memory_bytes: int | None = None) -> int:
    """Return the size of a local cluster's object store, whose shared memory is in the folder.

    `memory_bytes` are those of the machine; None: of this one.
    """
    if not has_gpus:
        return LOCAL_OBJECT_STORE_BYTES
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if memory_bytes is None else memory_bytes
    shared = shutil.disk_usage(folder).free if folder.is_dir() else 0
    return max(LOCAL_OBJECT_STORE_BYTES, int(min(OBJECT_STORE_SHARE * memory, SHARED_MEMORY_SHARE * shared)))


def shared_memory_warning(folder: Path, needed_bytes: int) -> str:
    """Return what to say when the object store does not fit into shared memory, as in a container; "" when it does."""
    free_bytes = shutil.disk_usage(folder).free if folder.is_dir() else 0
    if free_bytes >= needed_bytes:
        return ""
    return (
        f"{folder} has {free_bytes >> 20} MiB, so Ray's object store of {needed_bytes >> 20} MiB lies on disk, in a "
        f"temporary folder, and is slower; give a container more with --shm-size {2 * needed_bytes >> 30}g"
    )


def _watched_head(config: Config) -> AbstractContextManager[None]:
    address = ray.get_runtime_context().gcs_address
    return watch_head(address, lambda silent_seconds: end_run(config, address, silent_seconds))


@contextmanager
def _joined(address: str, arguments: dict[str, Any]) -> Iterator[RaySession]:
    try:
        # A cluster like our local ones is there for loopback only; Ray would look for it at the machine's own address.
        with on_loopback() if _lives_on_loopback(address) else nullcontext():
            context = ray.init(address=address, **arguments)
    except AuthenticationError as error:
        raise PlacementError(f"ray.address '{address}': the cluster refuses this token; {TOKEN_ADVICE}") from error
    except (ConnectionError, RpcError) as error:
        raise PlacementError(f"ray.address '{address}': no Ray cluster answers there: {error}") from error
    except RuntimeError as error:
        if VERSION_MISMATCH not in str(error):
            raise
        raise PlacementError(
            f"ray.address '{address}': the driver needs the very Ray and Python of the cluster, to the last number: "
            f"{_sides(str(error))}; use the cluster's, or let preceptor submit start the driver there"
        ) from error
    try:
        with private_umask(), interrupt_on_sigterm():
            yield RaySession(context.dashboard_url or None)
    finally:
        ray.shutdown()


def _lives_on_loopback(address: str) -> bool:
    """Ask the cluster where its nodes are; `ray.init` would try for 20 s, and then not say what is wrong."""
    if ":" not in address or "://" in address:  # "auto", or Ray's client protocol, which has its own answer
        return False
    try:
        _connect(address, CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise ConnectionError(str(error)) from error
    ensure_token_if_auth_enabled(create_token_if_missing=False)  # without one, the client would end this process
    nodes = GcsClient(address=address).get_all_node_info().values()
    return {node.node_manager_address for node in nodes} == {LOOPBACK}


def _sides(mismatch: str) -> str:
    """Shorten Ray's paragraph about two versions of Ray and two of Python to half a line."""
    sides = re.findall(r"(?:Ray|Python): (\S+)", mismatch)
    return "the cluster has Ray {} with Python {}, this process Ray {} with Python {}".format(*sides)
