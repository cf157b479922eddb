"""vLLM finds our plugins without an installation, and beside one that lacks some."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest

from cluster.vllm.plugins import FOLDER, GROUP

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import subprocess, sys
from importlib.metadata import entry_points
from cluster.vllm.plugins import GROUP, provide_plugins
provide_plugins(); provide_plugins()
print(sorted(f"{point.name} = {point.value}" for point in entry_points(group=GROUP)))
child = "from importlib.metadata import entry_points; print(len(entry_points(group='vllm.general_plugins')))"
subprocess.run([sys.executable, "-S", "-c", child], check=True)
"""


def declared() -> dict[str, str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]


def test_the_folder_has_the_entry_points_of_the_distribution() -> None:
    [distribution] = distributions(path=[str(FOLDER)])
    assert {point.name: point.value for point in distribution.entry_points if point.group == GROUP} == declared()
    assert distribution.metadata["Name"] == "preceptor"  # so that it stands before an installed one


@pytest.mark.parametrize("installed", [None, "[vllm.general_plugins]\npreceptor_gone = cluster.gone:register\n"])
def test_a_process_and_its_children_find_them_with_a_path_alone(tmp_path: Path, installed: str | None) -> None:
    if installed is not None:  # an older one
        folder = tmp_path / "preceptor-0.1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.4\nName: preceptor\nVersion: 0.1.0\n")
        (folder / "entry_points.txt").write_text(installed)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, "-S", "-c", SCRIPT]  # without site-packages
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found, in_child = done.stdout.splitlines()
    assert found == str(sorted(f"{name} = {value}" for name, value in declared().items()))
    assert in_child == str(len(declared()))
