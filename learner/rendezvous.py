"""Chooses where the processes of a group meet."""

import socket
import tempfile
from ipaddress import ip_address
from pathlib import Path

import ray


def free_address() -> str:
    """Return where a group can meet: `tcp://host:port` of this node, or a file where this node is the only one.

    Torch's TCP store listens on all interfaces and takes every connection; a file has an owner and a mode.
    """
    host = ray.util.get_node_ip_address()
    if ip_address(host).is_loopback:
        return (Path(tempfile.mkdtemp(prefix="rendezvous-")) / "store").as_uri()
    return f"tcp://{host}:{free_port()}"


def free_port() -> int:
    """Return a TCP port of this node that is free now; nothing reserves it."""
    with socket.socket() as listener:
        listener.bind((ray.util.get_node_ip_address(), 0))
        return int(listener.getsockname()[1])
