"""Names the interpreter for programs that tests start as `PYTHON -c PROGRAM`."""

import os
import sys

from cluster.nodes.preloaded_python import PYTHON_VARIABLE


def python() -> str:
    """Return the one that has torch, transformers and vLLM already, if the test uses the fixture `preloaded`."""
    return os.environ.get(PYTHON_VARIABLE, sys.executable)
