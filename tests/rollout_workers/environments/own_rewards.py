"""Reward functions of a user."""

import os
import time
from typing import Any


def columns_and_length(prompt: str, completion: str, columns: dict[str, Any]) -> float:
    """Add up everything that a reward function is given, so that each part can be seen in the sum."""
    return len(prompt) + 10 * len(completion) + 100 * columns["level"] + 1000 * (columns["finish_reason"] == "stop")


def half(prompt: str, completion: str, columns: dict[str, Any]) -> float:
    return 0.5


def slow(prompt: str, completion: str, columns: dict[str, Any]) -> float:
    if completion == "wait":
        time.sleep(60)
    return 1.0


def failing(prompt: str, completion: str, columns: dict[str, Any]) -> Any:
    """Do what the completion says: return another value, raise, or end the process."""
    if completion == "exit":
        os._exit(3)
    return {"nan": float("nan"), "none": None, "text": "0.5"}[completion]
