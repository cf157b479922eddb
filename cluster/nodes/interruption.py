"""Turns the first Ctrl-C or SIGTERM into a request to stop after the step; the second ends the run at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Records that the user or Ray asked the run to end."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    @property
    def is_asked(self) -> bool:
        return self._asked.is_set()

    def ask(self) -> None:
        self._asked.set()


@contextmanager
def stop_on_signals(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Turn signals into a request to stop while the context lasts.

    Raises:
        KeyboardInterrupt: in the main thread, when a second signal comes.
    """
    stop = StopRequest()

    def handle(_number: int, _frame: FrameType | None) -> None:
        if stop.is_asked:
            raise KeyboardInterrupt
        stop.ask()
        say("stopping when this step is done and a checkpoint is written; once more to leave at once")

    with _handling(SIGNALS, handle):
        yield stop


@contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end what runs in the context as Ctrl-C does.

    Ray's own handler aborts the process, so nothing that was begun would be undone.
    """
    with _handling((signal.SIGTERM,), signal.default_int_handler):
        yield


@contextmanager
def _handling(numbers: tuple[signal.Signals, ...], handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Install a handler while the context lasts; Python allows it in the main thread only, elsewhere do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
