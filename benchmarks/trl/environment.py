"""`python -m benchmarks.trl.environment`: makes the Python environment in which TRL is measured.

It holds no vLLM, Ray or DeepSpeed, which TRL and accelerate would find and import. What it has in common with our own
environment (torch, transformers, accelerate, numpy, ...) it has in the version that our lock pins.
"""

import argparse
from pathlib import Path

from cluster.install.install import create_environment, digest, install_cpu_torch, only_one, pip

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / "benchmarks/.trl"
LOCK = ROOT / "cluster/install/cpu.lock"
TRL_PACKAGES = ("trl==1.16.0", "datasets==5.2.0", "accelerate", "transformers", "torch")
PROMPT_PACKAGES = ("math-verify", "msgspec", "numpy", "pyarrow")  # what our own reader of prompt files imports
STAMP = "trl.stamp"  # in the environment, written once it holds all the packages


def main() -> None:
    """Make the environment where it is missing, and print its interpreter."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl.environment", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ENVIRONMENT)
    print(make_environment(parser.parse_args().folder.resolve()))


def make_environment(folder: Path = ENVIRONMENT) -> Path:
    """Return the interpreter of an environment that holds these packages, made anew unless it already does.

    Raises:
        InstallError: venv or pip failed.
    """
    stamp, key = folder / STAMP, environment_key()
    with only_one(ROOT):
        if not stamp.exists() or stamp.read_text() != key:
            create_environment(folder)
            torch = next(pin for pin in LOCK.read_text().splitlines() if pin.startswith("torch=="))
            install_cpu_torch(folder, torch)
            pip(folder, "install", "--constraint", str(LOCK), *TRL_PACKAGES, *PROMPT_PACKAGES)
            stamp.write_text(key)
    return folder / "bin/python"


def environment_key() -> str:
    """Return what tells one choice of packages from another."""
    return digest(LOCK.read_bytes(), *(package.encode() for package in (*TRL_PACKAGES, *PROMPT_PACKAGES)))


if __name__ == "__main__":
    main()
