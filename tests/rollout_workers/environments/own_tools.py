"""Tools of a user, some of which fail."""

import os
import time
from typing import Any


def repeat(text: str, times: int = 2) -> str:
    """Repeat a text.

    Args:
        text: what to repeat
        times: how often
    """
    return text * times


def divide(a: float, b: float) -> dict[str, Any]:
    """Divide two numbers.

    Args:
        a: the dividend
        b: the divisor
    """
    return {"quotient": a / b}


def wait(seconds: float) -> None:
    """Wait.

    Args:
        seconds: how long
    """
    time.sleep(seconds)


def crash() -> None:
    """End the process."""
    os._exit(3)


def undocumented(a: int) -> int:
    return a
