"""Calls actors of another pool by their names, from an actor that was not given their handles.

Pools start dead actors again under new names, so the names are read anew once in a while.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from cluster.contracts.errors import ActorDiedError, PreceptorError

LISTING_SECONDS = 5.0  # between two lists of the actors that there are
WAIT_SECONDS = 0.2  # before all are called again
AGAIN = r"(-again-\d+)?"  # at the end of a restarted actor's name

Answer = TypeVar("Answer")


class NamedActors:
    """Calls the actor with the least work of those whose names fit a pattern; dead ones are called no more."""

    def __init__(self, pattern: str, retry_seconds: float, error: type[PreceptorError]) -> None:
        """Take what the whole names fit, how long a call tries, and the class of what it raises."""
        self._pattern, self._retry_seconds, self._error = re.compile(pattern), retry_seconds, error
        self._actors: dict[str, Any] = {}
        self._listed_at = -LISTING_SECONDS
        self._loads: Counter[str] = Counter()  # work under way, by actor

    async def call(
        self,
        method: Callable[[Any], Awaitable[Answer]],
        load: int,
        otherwise: str,
        is_answer: Callable[[Answer], bool] = lambda answer: True,
    ) -> Answer:
        """Return what the first actor answers whose answer is one; `load` is how much work the call is.

        Raises:
            PreceptorError: of the class given: an actor raised an exception, or none answered in time, for which
                `otherwise` is the message.
        """
        import ray

        deadline = time.monotonic() + self._retry_seconds
        while time.monotonic() < deadline:
            await self._list_actors()
            for name in sorted(self._actors, key=self._loads.__getitem__):
                self._loads[name] += load
                try:
                    answer = await method(self._actors[name])
                except (ray.exceptions.RayActorError, ActorDiedError):
                    self._actors.pop(name, None)
                except ray.exceptions.RayTaskError as error:
                    raise self._error(f"{name}: {error.cause}") from error
                else:
                    if is_answer(answer):
                        return answer
                finally:
                    self._loads[name] -= load
            await asyncio.sleep(WAIT_SECONDS)
        raise self._error(otherwise)

    async def _list_actors(self) -> None:
        """Find out which actors there are, once in a while; at once when none is known."""
        if self._actors and time.monotonic() < self._listed_at + LISTING_SECONDS:
            return
        self._listed_at = time.monotonic()
        named = await asyncio.to_thread(named_actors, self._pattern)
        self._actors = {name: self._actors.get(name, actor) for name, actor in named.items()}


def named_actors(pattern: re.Pattern[str]) -> dict[str, Any]:
    """Return the actors of this run whose names fit, by name."""
    import ray

    actors = {}
    for name in ray.util.list_named_actors():
        if pattern.fullmatch(name):
            try:
                actors[name] = ray.get_actor(name)
            except ValueError:  # it ended just now
                continue
    return actors
