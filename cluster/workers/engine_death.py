"""An engine whose process died takes its actor with it: whoever waits for either learns of it in the same way."""

import asyncio
import logging
import os
from collections.abc import Callable

LOOK_SECONDS = 1.0

_log = logging.getLogger("preceptor")


async def end_with_engine(is_dead: Callable[[], bool], look_seconds: float = LOOK_SECONDS) -> None:
    """End this process once the engine is dead; calls that wait for the engine might otherwise wait for ever."""
    while not is_dead():
        await asyncio.sleep(look_seconds)
    _log.error("the process of the engine is gone; its actor ends with it")
    os._exit(1)
