"""Hosts that share this machine: each with its own network, name, process ids, shared memory and local files.

A host is a set of Linux namespaces, a virtual cable leads from it to a switch, and they see each other as machines of a
rack do. All of it lives inside namespaces of the program itself (`isolated`), so nothing is left when that has ended,
however it ended. Needs root, or a system that lets users make namespaces.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from benchmarks.harness.process_trees import descendants
from cluster.nodes.interruption import interrupt_on_sigterm

NETWORK = "198.18.77"  # of the range that RFC 2544 keeps for tests
SWITCH = "switch"
FOLDER = Path("/mnt")  # a file system in memory is laid over it, which goes with the namespaces
FOLDER_BYTES, SHARED_MEMORY_BYTES = 4 << 30, 2 << 30
START_SECONDS = 10.0
# Process 1 of a host: takes its name, files and shared memory, and then takes in orphans until it is switched off.
BOOT = """
set -e
hostname "$1"
mount -t tmpfs -o size="$2" tmpfs /dev/shm
mount --bind "$3/$1" "$3/local"
mount --bind "$3/hosts" /etc/hosts
touch "$3/$1/booted"
sleep infinity & wait
"""


@dataclass(frozen=True)
class Host:
    """A machine of the rack."""

    name: str
    address: str
    process: "subprocess.Popen[bytes]"  # `unshare`, whose child is the host's process 1

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], output: IO[str] = sys.stderr
    ) -> "subprocess.Popen[bytes]":
        """Run a command there."""
        enter = ["nsenter", "--target", str(self._first()), "--net", "--uts", "--ipc", "--pid", "--mount"]
        return subprocess.Popen(
            [*enter, *command], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )

    def switch_off(self) -> None:
        """Pull its cable, so that nobody hears it end, and kill all that runs there."""
        _ip("link", "set", f"to-{self.name}", "down")
        self.close()

    def close(self) -> None:
        """Kill all that runs there: processes of a host end with its first one."""
        for process in reversed(descendants(self.process.pid)[:2]):
            process.kill()
        self.process.wait()

    def _first(self) -> int:
        return int(descendants(self.process.pid)[1].pid)


@dataclass(frozen=True)
class Rack:
    """Hosts at one switch, at which this program is too."""

    folder: Path  # that all hosts share
    local: Path  # the same path on every host, another folder on each
    hosts: Mapping[str, Host]

    def seen_from_here(self, name: str, path: Path) -> Path:
        """Return where this program finds a file among a host's own; links of the host are followed."""
        here = self.folder / name / path.relative_to(self.local)
        return self.seen_from_here(name, here.readlink()) if here.is_symlink() else here


def isolated(module: str, arguments: Sequence[str]) -> NoReturn:
    """Let this process become one that runs a module with arguments in namespaces of its own.

    Raises:
        SystemExit: a program that this takes is missing.
    """
    for program, package in (("unshare", "util-linux"), ("ip", "iproute2")):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is not on PATH; it is in the package {package}")
    command = ["unshare", "--net", "--mount", "--ipc", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += [] if os.geteuid() == 0 else ["--map-root-user"]
    os.execvp(command[0], [*command, sys.executable, "-m", module, *arguments])


@contextmanager
def rack(names: Sequence[str]) -> Iterator[Rack]:
    """Set up hosts of these names, and switch all of them off at the end."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FOLDER_BYTES}", "tmpfs", str(FOLDER)], check=True)
    _lay_network()
    (FOLDER / "local").mkdir()
    known = [f"{_address(place)} {name}" for place, name in enumerate(names)]
    (FOLDER / "hosts").write_text("\n".join(["127.0.0.1 localhost", *known, ""]))
    hosts: dict[str, Host] = {}
    try:
        with interrupt_on_sigterm():  # else the first process of a namespace ignores it
            for place, name in enumerate(names):
                hosts[name] = _boot(name, _address(place))
            yield Rack(FOLDER, FOLDER / "local", hosts)
    finally:
        for host in hosts.values():
            host.close()


def _lay_network() -> None:
    _ip("link", "set", "lo", "up")
    _ip("link", "add", SWITCH, "type", "bridge")
    _ip("address", "add", f"{NETWORK}.1/24", "dev", SWITCH)
    _ip("link", "set", SWITCH, "up")


def _boot(name: str, address: str) -> Host:
    (FOLDER / name).mkdir()
    spaces = ["--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
    boot = ["bash", "-c", BOOT, "boot", name, str(SHARED_MEMORY_BYTES), str(FOLDER)]
    host = Host(name, address, subprocess.Popen(["unshare", *spaces, *boot], stdin=subprocess.DEVNULL))
    deadline = time.monotonic() + START_SECONDS
    while not (FOLDER / name / "booted").exists():
        if time.monotonic() > deadline or host.process.poll() is not None:
            raise SystemExit(f"{name}: the host did not boot; are namespaces allowed here?")
        time.sleep(0.05)
    _connect(host)
    return host


def _connect(host: Host) -> None:
    here, there = f"to-{host.name}", ["nsenter", "--target", str(host._first()), "--net", "ip"]
    _ip("link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", str(host._first()))
    _ip("link", "set", here, "master", SWITCH, "up")
    for words in (["link", "set", "lo", "up"], ["address", "add", f"{host.address}/24", "dev", "eth0"]):
        subprocess.run([*there, *words], check=True)
    subprocess.run([*there, "link", "set", "eth0", "up"], check=True)


def _address(place: int) -> str:
    return f"{NETWORK}.{10 + place}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
