"""Turns the first Ctrl-C or SIGTERM into a request to stop after the step; the second ends the run at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_signals(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """Set the event at a signal while the context lasts, and turn a second one into KeyboardInterrupt."""
    stop = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
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
