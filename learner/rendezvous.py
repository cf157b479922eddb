"""Where the processes of a group find each other."""

import socket

import ray


def free_address() -> str:
    """Return `tcp://host:port` of this node with a port that is free now."""
    return f"tcp://{ray.util.get_node_ip_address()}:{free_port()}"


def free_port() -> int:
    """Return a TCP port of this node that is free now; nothing reserves it."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
