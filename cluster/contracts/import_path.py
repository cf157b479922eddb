"""Loads an object that a run file names by import path, such as `my_package.losses:ALPHA`."""

import importlib
from typing import Any

from cluster.contracts.errors import ConfigError


def is_import_path(name: str) -> bool:
    """Return whether a name in the run file is an import path; the names of our own tables have no colon.

    Example:
        >>> is_import_path("my_package.losses:ALPHA"), is_import_path("reverse_kl")
        (True, False)
    """
    return ":" in name


def load_object(path: str, kind: str) -> Any:
    """Return the object at `package.module:Name`, of a `kind` that errors name; raise ConfigError if there is none.

    Example:
        >>> load_object("math:pi", "a number")
        3.141592653589793
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"'{path}' as {kind} cannot be imported: {reason}; give it as package.module:Name") from error
