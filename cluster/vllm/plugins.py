"""Lets vLLM find our plugins where no installed distribution names them: a checkout on PYTHONPATH, or an old install.

vLLM asks importlib.metadata for entry points in every process that it starts. A folder on the import path answers as
an installed distribution does, and before those that come later there.
"""

import os
import sys
from importlib.metadata import distributions, entry_points
from pathlib import Path

GROUP = "vllm.general_plugins"
FOLDER = Path(__file__).parent / "uninstalled"  # has the entry points of pyproject.toml


def provide_plugins() -> None:
    """Put FOLDER first on the import path of this process and of its children, if vLLM would miss a plugin."""
    known = {(point.name, point.value) for point in entry_points(group=GROUP)}
    ours = [point for distribution in distributions(path=[str(FOLDER)]) for point in distribution.entry_points]
    if all((point.name, point.value) in known for point in ours):
        return
    sys.path.insert(0, str(FOLDER))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
