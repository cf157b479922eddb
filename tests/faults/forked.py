"""Runs pytest in forks of a process that has imported what tests share, for that takes longer than most of them.

For tests that start no engine: what engines are made of starts threads when it is imported, and a fork has none.
"""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = ("benchmarks", "cluster", "examples", "learner", "rollout_workers", "teacher_workers", "tests")
SHARED = ["numpy", "pyarrow", "msgspec", "pytest", "torch", "torch.profiler", "triton"]
SHARED += ["transformers.modeling_utils", "transformers.models.llama.modeling_llama"]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(SHARED)


def run_in_fork(tree: Path, arguments: Sequence[str], log: Path, limit_seconds: float) -> int | None:
    """Run pytest on a tree, and return its exit code; None: it took too long. What it prints goes to `log`."""
    process = FORKS.Process(target=run_pytest, args=(tree, arguments, log))
    process.start()
    process.join(limit_seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def run_pytest(tree: Path, arguments: Sequence[str], log: Path) -> None:
    """End this process with pytest's exit code."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]  # of the tree without a fault
    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path).resolve() not in (ROOT, Path.cwd()))]
    os.environ["PYTHONPATH"] = str(tree)
    import pytest

    sys.exit(int(pytest.main(list(arguments))))
