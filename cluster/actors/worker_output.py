"""Reads what an actor's process and those of its engine have printed, for the reason why they ended.

Ray keeps it in two files of the node's session folder, which goes with the cluster; a run keeps those of actors that
failed in its own folder. Ray is imported where it is called, for `preceptor plan` runs without it.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.contracts.errors import in_one_line

KEPT_BYTES = 1 << 19  # of each of an actor's two files: the end
KEPT_FILES = 32  # of a run; the newest
REMOTE_SECONDS = 10.0  # for the node that has the files, if it still lives
# The last line of a traceback, bare or after what vLLM's log puts before it, and what C++ and the interpreter say.
ERROR_LINE = re.compile(
    r"^(?:.*\[\w+\.py:\d+\] )?"
    r"((?:\w+\.)*(?:\w*(?:Error|Exception): .+|\w+Error)|Fatal Python error: .+| *what\(\): .+)$",
    re.MULTILINE,
)
# What those say who wait for the engine, and not why it ended.
FOLLOWING_ERRORS = ("vllm.v1.engine.exceptions.", "RuntimeError: Engine core initialization failed", "ray.exceptions.")


def last_error(output: str) -> str:
    """Return the last line that names an error of the process itself; "" if there is none.

    Example:
        >>> last_error("Traceback (most recent call last):" + chr(10) + "KeyError: 'w4'" + chr(10) + "bye")
        "KeyError: 'w4'"
    """
    errors: list[str] = [line for line in ERROR_LINE.findall(output) if not line.startswith(FOLLOWING_ERRORS)]
    return in_one_line(errors[-1].strip()) if errors else ""


def own_output() -> str:
    """Return the end of what this process and those that it started have printed, where that goes to files."""
    return "".join(_end_of(Path(f"/proc/self/fd/{stream}").resolve()) for stream in (1, 2))


def output_of(actor_id: str) -> tuple[str, str]:
    """Return the name of an actor, dead or alive, and the end of its output; "" where it cannot be had."""
    import ray
    from ray._private.state import state  # ray.util.state needs the dashboard
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        entry: dict[str, Any] = state.actor_table(actor_id)
        if not entry:
            return "", ""
        pid, node_id = entry["Pid"], entry["Address"]["NodeID"]
        if node_id in ("", ray.get_runtime_context().get_node_id()):
            return entry["Name"], output_of_process(pid)
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        read = ray.remote(num_cpus=0, max_retries=0)(output_of_process).options(scheduling_strategy=there)
        return entry["Name"], ray.get(read.remote(pid), timeout=REMOTE_SECONDS)
    except ray.exceptions.RayError:  # the node or the head is gone, too
        return "", ""


def output_of_process(pid: int) -> str:
    """Return the end of the output of one of Ray's worker processes, dead or alive, of this node."""
    from ray._private import worker

    if worker._global_node is None:
        return ""
    logs = Path(worker._global_node.get_logs_dir_path())
    return "".join(_end_of(path) for ending in ("out", "err") for path in logs.glob(f"worker-*-{pid}.{ending}"))


def keep(folder: Path, name: str, output: str) -> Path | None:
    """Write an actor's output to a file that only its owner may read, and return it; None: it cannot be written."""
    path = folder / f"{name}.log"
    with suppress(OSError):  # the error that is to be explained counts more than a full disk
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(output, encoding="utf-8")
        for old in sorted(folder.glob("*.log"), key=lambda file: file.stat().st_mtime)[:-KEPT_FILES]:
            old.unlink()
        return path
    return None


def _end_of(file: Path) -> str:
    if not file.is_file():  # a terminal, or a pipe
        return ""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - KEPT_BYTES))
        return opened.read().decode(errors="replace")
