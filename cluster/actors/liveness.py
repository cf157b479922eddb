"""Notices actors that died or fell silent while the driver waits for none of their answers.

Ray reports a dead actor to a caller that waits for its answer, and a stopped one to no caller. A thread asks every
actor for a sign of life and ends those that give none: silence becomes death, and all other code handles deaths only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.actor import ActorHandle

POLL_SECONDS = 1.0  # of the watch's thread

_log = logging.getLogger("preceptor")


async def end_with_engine(is_dead: Callable[[], bool], check_seconds: float = 1.0) -> None:
    """End this process once the engine is dead; calls that wait for the engine might otherwise wait for ever."""
    while not is_dead():
        await asyncio.sleep(check_seconds)
    _log.error("the process of the engine is gone; its actor ends with it")
    os._exit(1)


@dataclass
class _Watched:
    actor: ActorHandle
    sign_of_life: Any  # reference
    requested_at: float


class Watch:
    """Requests signs of life from actors, each of which must come within `silence_seconds`."""

    def __init__(self, silence_seconds: float) -> None:
        self._silence_seconds = silence_seconds
        self._watched: dict[str, _Watched] = {}
        self._lost: set[str] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def add(self, name: str, actor: ActorHandle) -> None:
        with self._lock:
            self._watched[name] = _request(actor)

    def forget(self, name: str) -> None:
        """Watch an actor no longer; it may be lost or unknown."""
        with self._lock:
            self._watched.pop(name, None)
            self._lost.discard(name)

    @property
    def lost(self) -> frozenset[str]:
        """Return the names of actors that died and were not forgotten since."""
        with self._lock:
            return frozenset(self._lost)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            with self._lock:
                watched = dict(self._watched)
            if watched:
                self._check(watched)

    def _check(self, watched: dict[str, _Watched]) -> None:
        import ray

        signs = [one.sign_of_life for one in watched.values()]
        ready = set(ray.wait(signs, num_returns=len(signs), timeout=0)[0])
        for name, one in watched.items():
            if one.sign_of_life in ready:
                self._renew(name, one)
            elif time.monotonic() - one.requested_at > self._silence_seconds:
                _log.warning("%s: gave no sign of life for %.0f s; its process is ended", name, self._silence_seconds)
                ray.kill(one.actor)

    def _renew(self, name: str, one: _Watched) -> None:
        import ray

        try:
            ray.get(one.sign_of_life)
            renewed = _request(one.actor)
        except ray.exceptions.RayError:
            renewed = None
        with self._lock:
            if self._watched.get(name) is not one:  # forgotten meanwhile
                return
            if renewed:
                self._watched[name] = renewed
            else:
                del self._watched[name]
                self._lost.add(name)


def _request(actor: ActorHandle) -> _Watched:
    return _Watched(actor, actor.__ray_ready__.remote(), time.monotonic())
