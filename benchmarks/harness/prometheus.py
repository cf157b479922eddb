"""A Prometheus of one's own that reads the endpoints which Ray names, and what it answers."""

import json
import shutil
import socket
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRAPE_SECONDS = 5  # Ray itself brings new figures to its endpoints every few seconds
END_SECONDS = 20.0
# As docs/metrics.md says it, with the file that Ray keeps in its temporary folder.
CONFIGURATION = """
global: {{scrape_interval: {seconds}s, scrape_timeout: {seconds}s}}
scrape_configs:
- job_name: ray
  file_sd_configs:
  - files: ["{discovery}"]
    refresh_interval: {seconds}s
"""


@dataclass(frozen=True)
class Prometheus:
    """Where it answers."""

    address: str  # http://host:port

    def is_ready(self) -> bool:
        """Return whether it answers yet."""
        try:
            return bool(self.query("vector(1)"))
        except urllib.error.URLError:
            return False

    def silent_targets(self) -> list[str]:
        """Return the endpoints that could not be read, and why."""
        with urllib.request.urlopen(f"{self.address}/api/v1/targets", timeout=30) as answer:
            targets: list[dict[str, Any]] = json.load(answer)["data"]["activeTargets"]
        return [f"{target['scrapeUrl']}: {target['lastError']}" for target in targets if target["health"] != "up"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Return the labels and the value of every series that an expression gives now.

        Raises:
            HTTPError: it is no expression.
        """
        asked = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.address}/api/v1/query?{asked}", timeout=30) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return [(series["metric"], float(series["value"][1])) for series in found]


@contextmanager
def prometheus(discovery: Path) -> Iterator[Prometheus]:
    """Start Prometheus on the endpoints that a file of Ray's names, and end it."""
    program = shutil.which("prometheus")
    if program is None:
        raise SystemExit("prometheus is not on PATH; on Debian: apt-get install prometheus")
    with tempfile.TemporaryDirectory() as folder:
        configuration = Path(folder) / "prometheus.yml"
        configuration.write_text(CONFIGURATION.format(seconds=SCRAPE_SECONDS, discovery=discovery))
        host = f"127.0.0.1:{free_port()}"
        places = [f"--config.file={configuration}", f"--storage.tsdb.path={folder}/data"]
        process = subprocess.Popen(
            [program, *places, f"--web.listen-address={host}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield Prometheus(f"http://{host}")
        finally:
            process.terminate()
            process.wait(END_SECONDS)


def free_port() -> int:
    """Return a port at which nobody listens on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])
