"""How much slower a process computes while all other cores compute too: hardware threads that share a core do."""

import statistics
import subprocess
import sys
from collections.abc import Sequence

SECONDS = 2.0
REPEATS = 3
# Small products in the cache: what is shared then is the core itself, not the memory.
WORK = f"""
import time
import numpy as np
matrix = np.random.default_rng(0).random((96, 96), np.float32)
end, count = time.perf_counter() + {SECONDS}, 0
while time.perf_counter() < end:
    for _ in range(100):
        matrix @ matrix
    count += 1
print(count)
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def slowdown(cores: int) -> float:
    """Return the speed of a process that has the machine to itself over that of one of as many as there are cores."""
    alone: list[int] = []
    together: list[int] = []
    for _ in range(REPEATS):
        alone += _counts(1)
        together += _counts(cores)
    return statistics.median(alone) / statistics.median(together)


def _counts(processes: int) -> Sequence[int]:
    started = [
        subprocess.Popen([sys.executable, "-c", WORK], stdout=subprocess.PIPE, text=True, env=ONE_THREAD)
        for _ in range(processes)
    ]
    return [int(process.communicate()[0]) for process in started]
