"""A Ray cluster of several hosts with a token, as its owner starts it, and runs that are submitted to it."""

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.harness.hosts import FOLDER, Host, Rack, rack
from benchmarks.harness.model_pairs import ROOT
from cluster.demo import EMBEDDED

HEAD, CPUS_PER_NODE = "head", 4
STORE_BYTES = 200 << 20
START_SECONDS = 120.0
CHECK_SECONDS = 0.5
GCS_PORT, DASHBOARD_PORT, AGENT_PORT = 6379, 8265, 52365


@dataclass(frozen=True)
class Door:
    """Where a cluster is entered."""

    dashboard: str  # http://host:port
    token_file: Path
    folder: Path  # for temporary files of those who enter

    def environment(self) -> dict[str, str]:
        """Return the environment of the cluster's processes and of its users."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_A", "PRECEPTOR_"))}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # the nodes' `python` is ours
        modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return {**kept, **token, "PATH": path, "PYTHONPATH": modules, "TMPDIR": str(self.folder)}

    def ask(self, path: str) -> Any:
        """Return what the dashboard answers, as JSON."""
        headers = {"Authorization": f"Bearer {self.token_file.read_text()}"}
        request = urllib.request.Request(f"{self.dashboard}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def living_actors(self) -> list[Mapping[str, Any]]:
        """Return the actors that live, with name, class and node."""
        found = self.ask("/api/v0/actors?limit=1000&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE")
        actors: list[Mapping[str, Any]] = found["data"]["result"]["result"]
        return actors

    def nodes(self) -> dict[str, str]:
        """Return the address of every node that lives, by its id."""
        found = self.ask("/api/v0/nodes?limit=100&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE")
        return {node["node_id"]: node["node_ip"] for node in found["data"]["result"]["result"]}

    def takes_jobs(self, num_nodes: int) -> bool:
        """Return whether so many nodes are there, and the head's agent, which starts jobs."""
        agent = f"{self.dashboard.removesuffix(f':{DASHBOARD_PORT}')}:{AGENT_PORT}/api/local_raylet_healthz"
        try:
            urllib.request.urlopen(agent, timeout=5).close()
        except urllib.error.HTTPError:
            pass  # it answers, if only to refuse
        except OSError:
            return False
        try:
            return len(self.nodes()) == num_nodes
        except (OSError, ValueError, KeyError, TypeError):
            return False


@contextmanager
def cluster_of_hosts(nodes: Sequence[str]) -> Iterator[tuple[Door, Rack]]:
    """Start a Ray cluster whose head does nothing but lead, and yield it when it takes jobs."""
    with rack((HEAD, *nodes)) as hosts:
        head = hosts.hosts[HEAD]
        door = Door(f"http://{head.address}:{DASHBOARD_PORT}", hosts.folder / "token", hosts.local)
        _write_token(door.token_file)
        _start_node(head, _head_options(head.address, hosts.local / "ray"), door)
        wait_until(lambda: door.takes_jobs(1), START_SECONDS, "the head takes jobs")
        for name in nodes:
            host = hosts.hosts[name]
            joining = [f"--address={head.address}:{GCS_PORT}", f"--node-ip-address={host.address}"]
            _start_node(host, [*joining, f"--num-cpus={CPUS_PER_NODE}"], door)
        wait_until(lambda: door.takes_jobs(1 + len(nodes)), START_SECONDS, "all nodes have joined")
        yield door, hosts


def preceptor(door: Door, *arguments: str, output: IO[str], **variables: str) -> "subprocess.Popen[bytes]":
    """Start a command of Preceptor in the folder of the embedded run file."""
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    environment = door.environment() | variables
    return subprocess.Popen(
        command, env=environment, cwd=EMBEDDED, stdin=subprocess.DEVNULL, stdout=output, stderr=output
    )


def submit(door: Door, overrides: Sequence[str], output: IO[str]) -> "subprocess.Popen[bytes]":
    """Submit the embedded run, and follow it."""
    return preceptor(door, "submit", "demo.toml", *overrides, "--address", door.dashboard, output=output)


def wait_until(is_true: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until something is true.

    Raises:
        SystemExit: it did not become so in time.
    """
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {seconds:.0f} s until {what}")
        time.sleep(CHECK_SECONDS)


def _write_token(path: Path) -> None:
    """Write a fresh token that only its owner may read."""
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))


def _start_node(host: Host, options: Sequence[str], door: Door) -> None:
    """Start Ray on a host; it stays, and what it prints is in a file."""
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
    command += [f"--node-name={host.name}", f"--object-store-memory={STORE_BYTES}", *options]
    with (FOLDER / f"{host.name}.log").open("w") as output:
        host.start(command, door.environment(), output)


def _head_options(address: str, ray_folder: Path) -> list[str]:
    """Return what makes a node the head, which does nothing but lead, with its dashboard where other hosts reach it."""
    ports = [f"--port={GCS_PORT}", f"--dashboard-port={DASHBOARD_PORT}", f"--dashboard-host={address}"]
    ports += [f"--dashboard-agent-listen-port={AGENT_PORT}"]
    return ["--head", f"--node-ip-address={address}", "--num-cpus=0", f"--temp-dir={ray_folder}", *ports]
