"""Ctrl-C and SIGTERM: the first asks the run to end in order after its step, the second ends it at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody asked the run to end."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    @property
    def is_asked(self) -> bool:
        """Return whether it was asked for."""
        return self._asked.is_set()

    def ask(self) -> None:
        """Ask for it; another time changes nothing."""
        self._asked.set()


@contextmanager
def stop_on_signals(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Turn signals into a request to stop while the context lasts; in threads other than the main one, listen to none.

    Raises:
        KeyboardInterrupt: in the main thread, when a second signal comes.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        if stop.is_asked:
            raise KeyboardInterrupt
        stop.ask()
        say("stopping when this step is done and a checkpoint is written; once more to leave at once")

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end what runs in the context as Ctrl-C does; in threads other than the main one, change nothing.

    Ray's own handler aborts the process, so nothing that was begun would be undone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
