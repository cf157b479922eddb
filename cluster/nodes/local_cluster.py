"""Starts a Ray cluster on this machine alone, behind a token, on loopback, and removes all of it at its end."""

import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # its stub is not complete
from ray._raylet import Config as RayletConfig  # type: ignore[attr-defined]

from cluster.contracts.errors import PlacementError
from cluster.nodes import reaper
from cluster.nodes.preloaded_python import PYTHON_VARIABLE, make_folder

LOOPBACK = "127.0.0.1"
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
TOKEN_FILE = "token"
REAPER_TIMEOUT_SECONDS = 3 * reaper.GRACE_SECONDS
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
RAY_FOLDER = "ray"  # Ray opens its folder to all users, so it is not the private one itself
NOT_STARTED = "node timed out during startup"  # in the `Exception` of Ray when its processes took more than 30 s


_log = logging.getLogger("preceptor")


class _NotStartedError(Exception):
    """Ray waited in vain for the cluster's own processes; another load of the machine may be the reason."""


@dataclass(frozen=True)
class LocalCluster:
    """Holds the addresses of a cluster."""

    folder: Path  # everything that it writes is below it
    address: str  # host:port, for `ray.init`
    dashboard_address: str | None  # host:port
    token_file: Path | None  # None: the user's own token, or none


@contextmanager
def local_cluster(one_gpu: bool = False, **arguments: Any) -> Iterator[LocalCluster]:
    """Start a cluster, yield its addresses, and end it; `arguments` are those of `ray.init`.

    Its processes write below one folder that only their owner may read, the token's file `token` included; the folder
    goes when the cluster ends, also when this very process is killed. A token or mode that the environment sets stays.
    With `one_gpu` it has one GPU at most, so that parts of a GPU are all of the same one.

    Raises:
        PlacementError: it did not start, twice.
    """
    with ExitStack() as stack:
        stack.enter_context(private_umask())
        try:
            cluster = _start(stack, one_gpu, arguments)
        except _NotStartedError:
            _log.warning("the local Ray cluster did not start in time; it is started once more")
            try:
                cluster = _start(stack, one_gpu, arguments)
            except _NotStartedError as error:
                raise PlacementError(
                    f"the local Ray cluster did not start, twice: {error}; see what else takes this machine's cores "
                    "and memory, or join a cluster with ray.address"
                ) from error
        yield cluster


def _start(stack: ExitStack, one_gpu: bool, arguments: Mapping[str, Any]) -> LocalCluster:
    """Start a cluster in a folder of its own, which end with the stack, or at once if it does not start."""
    with ExitStack() as own:
        folder = own.enter_context(_kept_folder())
        own.callback(_reload_authentication)
        gpus = {VISIBLE_GPUS: first_gpu(os.environ)} if one_gpu else {}
        with _environment(_variables(folder) | gpus), on_loopback():
            _reload_authentication()
            try:
                context = ray.init(address="local", _temp_dir=str(folder / RAY_FOLDER), **_with_python(arguments))
            except Exception as error:
                if NOT_STARTED not in str(error):
                    raise
                raise _NotStartedError(str(error).split(". ")[0]) from error
        own.callback(ray.shutdown)
        stack.push(own.pop_all())
    token = folder / TOKEN_FILE
    info = context.address_info
    return LocalCluster(folder, info["gcs_address"], info["webui_url"] or None, token if token.exists() else None)


def _with_python(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Have the workers started by the preloaded interpreter, if there is one."""
    if PYTHON_VARIABLE not in os.environ:
        return dict(arguments)
    environment = {"py_executable": os.environ[PYTHON_VARIABLE]} | arguments.get("runtime_env", {})
    return {**arguments, "runtime_env": environment}


@contextmanager
def private_umask() -> Iterator[None]:
    """Let this process, and those that it starts, create files that only their owner may read."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def _kept_folder() -> Iterator[Path]:
    """Make a folder, and the process that removes it and what still runs below it."""
    folder = make_folder("preceptor-")
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", reaper.__file__, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C goes to all processes of a terminal's group
    )
    assert process.stdin is not None
    try:
        yield folder
    finally:
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):  # it goes on by itself
            process.wait(REAPER_TIMEOUT_SECONDS)


def first_gpu(environment: Mapping[str, str]) -> str:
    """Return the first of the GPUs that an environment shows to CUDA, as CUDA names them.

    Example:
        >>> first_gpu({}), first_gpu({"CUDA_VISIBLE_DEVICES": "2,3"}), first_gpu({"CUDA_VISIBLE_DEVICES": ""})
        ('0', '2', '')
    """
    return environment.get(VISIBLE_GPUS, "0").split(",")[0]


def _variables(folder: Path) -> dict[str, str]:
    """Return the environment of the cluster's processes, a fresh token included, except what the user has set."""
    wanted = {
        "RAY_AUTH_MODE": "token",
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
        # Gloo, NCCL and vLLM would otherwise listen on the address that leads to the internet.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "VLLM_HOST_IP": LOOPBACK,
        # Workers without the driver's runtime environment, of which none would be used.
        "RAY_prestart_worker_first_driver": "0",
    }
    variables = {name: value for name, value in wanted.items() if name not in os.environ}
    if os.environ.get("RAY_AUTH_MODE", "token") == "token" and not any(name in os.environ for name in TOKEN_VARIABLES):
        token = folder / TOKEN_FILE  # a file, because environments are printed, logged and handed on
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        variables["RAY_AUTH_TOKEN_PATH"] = str(token)
    return variables | {reaper.MARK: str(folder), "TMPDIR": str(folder)}


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables while the cluster starts: its processes inherit them, and nothing else that we start does."""
    before = {name: os.environ.get(name) for name in (*variables, "RAY_AUTH_MODE")}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def on_loopback() -> Iterator[None]:
    """Let Ray take 127.0.0.1 as the node's address, as it does where it supports one node only.

    Ray replaces a loopback address that it is given by the machine's own, and listens on all of its interfaces then.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _reload_authentication() -> None:
    """Let Ray read mode and token from the environment; it keeps what it read first."""
    RayletConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
