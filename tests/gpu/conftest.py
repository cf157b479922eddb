"""Says what each file of tests on a GPU takes and needs, and leaves those out whose packages are not there.

Nothing here imports Ray, vLLM or DeepSpeed: the first rows run where torch alone is.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple


class Needs(NamedTuple):
    """What a file of tests takes on one GPU."""

    seconds: float  # expected, starts of engines included
    packages: tuple[str, ...] = ()  # beside torch and transformers


# In the order of what they say for their time; no GPU has run one yet.
NEEDS = {
    "test_row_kernels_on_gpu.py": Needs(30),
    "test_same_numbers_on_gpu.py": Needs(90),  # of which losses 20; teachers are skipped without Ray and vLLM
    "test_weight_sync_on_gpu.py": Needs(130, ("ray", "vllm")),
    "test_deaths_on_gpus.py": Needs(5, ("ray", "vllm")),  # 60 with two GPUs or three; one has no group
    "test_shared_gpu_run.py": Needs(240, ("ray", "vllm", "deepspeed")),
    "test_models.py": Needs(5, ("ray",)),
}


def missing_packages(*names: str) -> list[str]:
    """Return those of some packages that are not there."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def pytest_report_header() -> list[str]:
    """Say what runs, and what does not."""
    lines = []
    for name, needs in NEEDS.items():
        missing = missing_packages(*needs.packages)
        said = f"left out: no {', no '.join(missing)}" if missing else f"about {needs.seconds:.0f} s on one GPU"
        lines.append(f"tests/gpu/{name}: {said}")
    return lines


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave a file out without importing it if it needs what is not there."""
    needs = NEEDS.get(collection_path.name)
    return True if needs is not None and missing_packages(*needs.packages) else None
