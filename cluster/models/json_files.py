"""Reads the JSON objects that stand beside a model's weights."""

import json
from pathlib import Path
from typing import Any

from cluster.contracts.errors import ModelError
from cluster.contracts.files import read_text

MAX_JSON_BYTES = 1 << 28  # tokenizers of large vocabularies take tens of megabytes


def read_object(path: Path, model: str) -> dict[str, Any]:
    """Return the object that a file of the model holds.

    Raises:
        ModelError: it is missing, not JSON, or another value than an object.
    """
    text = read_text(path, "model file", ModelError, MAX_JSON_BYTES)
    try:
        found = json.loads(text)  # takes Infinity, which some configurations hold
    except (ValueError, RecursionError) as error:
        raise ModelError(f"model '{model}': {path.name} is not valid JSON: {error}; copy it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"model '{model}': {path.name} holds {type(found).__name__}; expected an object")
    return found
