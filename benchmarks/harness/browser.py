"""A headless Chromium that is told what to do through a pipe, by its DevTools protocol."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
ANSWER_SECONDS = 60.0
CHECK_SECONDS = 0.5
# Chromium reads commands from descriptor 3 and answers on 4, each message ended by a zero byte.
LAUNCH = 'exec "$@" 3<&{commands} 4>&{answers}'


class Page:
    """One tab, as large as it is told to be."""

    def __init__(self, commands: int, answers: int) -> None:
        """Open a tab; takes the two ends of the pipes."""
        self._commands, self._answers, self._read, self._last_id = commands, answers, b"", 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []  # what the browser said of itself; `observe` chooses
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def resize(self, width: int, height: int, scale: float) -> None:
        """Show so many points of a page, each as so many pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def observe(self) -> None:
        """Keep, as events, exceptions, console lines and requests of the pages that are opened from now on."""
        for domain in ("Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def set_cookie(self, url: str, name: str, value: str) -> None:
        """Send a cookie to the host of an address from now on."""
        self._call("Network.setCookie", url=url, name=name, value=value)

    def open(self, url: str) -> None:
        """Go to a page; one that differs after the `#` only is loaded anew too."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        return self._call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def click(self, label: str) -> None:
        """Click on the innermost element that shows these words and nothing else."""
        shows = f"element => element.textContent.trim() === {json.dumps(label)}"
        self.evaluate(f"[...document.querySelectorAll('*')].filter({shows}).pop()?.click()")

    def text(self) -> str:
        """Return the text that the page shows."""
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def wait_for(self, is_true: Callable[[str], bool], seconds: float) -> str:
        """Wait until something is true of the page's text, and return the last text, whether it became so or not."""
        deadline = time.monotonic() + seconds
        while not is_true(text := self.text()) and time.monotonic() < deadline:
            time.sleep(CHECK_SECONDS)
        return text

    def picture(self, path: Path, element: str | None = None) -> None:
        """Write what is shown as a PNG, or all of the element that a CSS selector finds."""
        parameters: dict[str, Any] = {"format": "png"}
        if element is not None:
            box = f"document.querySelector({json.dumps(element)}).getBoundingClientRect()"
            sides = self.evaluate(f"(box => [box.x + scrollX, box.y + scrollY, box.width, box.height])({box})")
            clip = dict(zip(("x", "y", "width", "height"), sides, strict=True)) | {"scale": 1}
            parameters |= {"clip": clip, "captureBeyondViewport": True}
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", **parameters)["data"]))

    def prefer(self, scheme: str, medium: str = "screen") -> None:
        """Take the user to prefer `light` or `dark` pages; the medium may be `print`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", media=medium, features=features)

    def _call(self, method: str, **parameters: Any) -> Any:
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._last_id:
            self.events.append(answer)
        if "error" in answer:
            raise SystemExit(f"chromium: {method}: {answer['error']['message']}")
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._answers], [], [], ANSWER_SECONDS)
            more = os.read(self._answers, 1 << 16) if ready else b""
            if not more:
                raise SystemExit(f"chromium: ended, or did not answer for {ANSWER_SECONDS:.0f} s")
            self._read += more
        first, self._read = self._read.split(b"\0", 1)
        found: dict[str, Any] = json.loads(first)
        return found


@contextmanager
def chromium() -> Iterator[Page]:
    """Start a browser with one tab and end it."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        raise SystemExit("no Chromium on PATH; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--hide-scrollbars"]
        options += ["--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []  # it refuses root's
        (theirs, commands), (answers, their_answers) = os.pipe(), os.pipe()
        launch = LAUNCH.format(commands=theirs, answers=their_answers)
        process = subprocess.Popen(
            ["bash", "-c", launch, "browser", program, *options],
            pass_fds=(theirs, their_answers),
            env={**os.environ, "TMPDIR": folder},  # its own goes with it
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(their_answers)
        try:
            yield Page(commands, answers)
        finally:
            process.terminate()
            process.wait()
            os.close(commands)
            os.close(answers)
