"""Regenerates `cpu.lock` and `cuda.lock` from pyproject.toml: `python -m cluster.install.lock [--upgrade]`.

It needs `uv` on PATH. One lock per backend serves every supported Python: the pins are resolved for the oldest and must
come out the same for the others. Without `--upgrade` a pin changes only where an input asks for it.
`PRECEPTOR_TORCH_INDEX` and the settings of uv say where packages are found; the locks do not repeat it.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from cluster.install.install import MIN_GLIBC, SUPPORTED_PYTHONS, TORCH_CPU_INDEX

HERE = Path(__file__).resolve().parent
HEADER = "# Every package of the environment. Regenerate with `python -m cluster.install.lock`.\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="move every pin to the newest version the inputs allow")
    upgrade = parser.parse_args().upgrade
    for backend in ("cpu", "cuda"):
        lock = HERE / f"{backend}.lock"
        pins = resolve(backend, lock, upgrade)
        lock.write_text(HEADER + pins)
        print(f"{lock.name}: {len(pins.splitlines())} packages")
    return 0


def resolve(backend: str, lock: Path, upgrade: bool) -> str:
    """Return the pins that hold for every supported Python, one a line."""
    oldest, *others = SUPPORTED_PYTHONS
    # uv takes the pins already in its output file as preferences.
    compile_pins(backend, oldest, *(["--upgrade"] if upgrade else []), "--output-file", str(lock))
    pins = lock.read_text()
    for python in others:
        others_pins = compile_pins(backend, python, "--constraints", str(lock))
        if others_pins != pins:
            different = sorted(set(others_pins.splitlines()) ^ set(pins.splitlines()))
            sys.exit(f"{lock.name}: Python {python[0]}.{python[1]} needs other packages than the oldest: {different}")
    return pins


def compile_pins(backend: str, python: "tuple[int, int]", *options: str) -> str:
    """Ask uv for one resolution on the oldest Linux that we support."""
    command = ["uv", "pip", "compile", "pyproject.toml", "--group", "dev", "--group", backend, *options]
    command += ["--python-version", "{}.{}".format(*python), "--no-header", "--no-annotate", "--quiet"]
    command += ["--python-platform", "x86_64-manylinux_{}_{}".format(*MIN_GLIBC)]
    command += ["--no-emit-find-links", "--no-emit-index-url"]
    if backend == "cpu":
        # Only torch's own page of that index: the others must come from PyPI.
        command += ["--find-links", os.environ.get("PRECEPTOR_TORCH_INDEX", TORCH_CPU_INDEX) + "/torch/"]
    return subprocess.run(command, cwd=HERE.parents[1], check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
