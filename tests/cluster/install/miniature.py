"""A project and a package index of a few kilobytes, so that the installer runs for real without a network."""

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

INSTALLER = Path(__file__).resolve().parents[3] / "cluster" / "install" / "install.py"
PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
BACKEND = """\
import zipfile
from pathlib import Path

FILES = {
    "preceptor-1.dist-info/METADATA": "Metadata-Version: 2.1\\nName: preceptor\\nVersion: 1\\n",
    "preceptor-1.dist-info/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    "preceptor-1.dist-info/entry_points.txt": "[console_scripts]\\npreceptor = platform:python_version\\n",
    "preceptor-1.dist-info/RECORD": "",
}


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(Path(wheel_directory, "preceptor-1-py3-none-any.whl"), "w") as wheel:
        for name, text in FILES.items():
            wheel.writestr(name, text)
    return "preceptor-1-py3-none-any.whl"
"""


@dataclass(frozen=True)
class Miniature:
    """A scratch clone whose lock pins packages of a local index."""

    root: Path

    @property
    def torch_index(self) -> Path:
        """The folder that stands for PyTorch's own index."""
        return self.root / "torch_index"

    @property
    def site_packages(self) -> Path:
        """Where the environment keeps its packages."""
        return next((self.root / ".venv" / "lib").glob("python3.*")) / "site-packages"

    def lock(self, *pins: str) -> None:
        """Replaces the lock."""
        (self.root / "cluster" / "install" / "cpu.lock").write_text("# a lock\n" + "\n".join(pins) + "\n")

    def install(self, python: Path = Path(sys.executable)) -> "subprocess.CompletedProcess[str]":
        """Runs the installer as make does, with no package index but the local ones."""
        environment = {
            "PATH": os.environ["PATH"],
            "PRECEPTOR_BACKEND": "cpu",
            "PRECEPTOR_TORCH_INDEX": self.torch_index.as_uri(),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": (self.root / "index").as_uri(),
            "PIP_NO_CACHE_DIR": "1",
        }
        command = [str(python), str(self.root / "cluster" / "install" / "install.py")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def make_miniature(root: Path) -> Miniature:
    """Lays out a clone with the real installer, `apple` in the package index, and torch in PyTorch's index alone."""
    (root / "cluster" / "install").mkdir(parents=True)
    shutil.copy(INSTALLER, root / "cluster" / "install")
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "backend.py").write_text(BACKEND)
    miniature = Miniature(root)
    add_wheel(root / "index", "apple", "1.0")
    add_wheel(miniature.torch_index, "torch", "9.9.9+cpu")
    add_wheel(miniature.torch_index, "apple", "1.0", marker="impostor")
    miniature.lock("apple==1.0", "torch==9.9.9+cpu")
    return miniature


def add_wheel(index: Path, name: str, version: str, marker: str = "genuine") -> None:
    """Puts a wheel with one module, whose only content is `marker`, into an index."""
    folder = index / name
    folder.mkdir(parents=True)
    info = f"{name}-{version}.dist-info"
    wheel = f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(folder / wheel, "w") as archive:
        archive.writestr(f"{name}.py", f"ORIGIN = {marker!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    (folder / "index.html").write_text(f'<html><body><a href="{wheel}">{wheel}</a></body></html>')
