"""GPUs are counted and measured by NVML, as CUDA_VISIBLE_DEVICES shows them."""

import pytest
import ray._private.thirdparty.pynvml as nvml

from cluster.contracts.errors import PlacementError
from cluster.placement.gpus import visible_gpus

SIZES = {0: 80, 1: 24, "GPU-a": 48, "MIG-b": 10}  # GiB


class Memory:
    def __init__(self, gib: int) -> None:
        self.total = gib << 30


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(name: object) -> object:
        if name not in SIZES:
            raise nvml.NVMLError(nvml.NVML_ERROR_NOT_FOUND)
        return name

    fakes = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": handle,
        "nvmlDeviceGetHandleByUUID": handle,
        "nvmlDeviceGetMemoryInfo": lambda name: Memory(SIZES[name]),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(nvml, name, fake)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (None, [80, 24]),
        ("1", [24]),
        ("1,0", [24, 80]),
        ("GPU-a,MIG-b", [48, 10]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_gpus_that_are_shown_are_measured(
    shown: str | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert visible_gpus() == expected


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,7")
    with pytest.raises(PlacementError, match=r"^CUDA_VISIBLE_DEVICES=0,7: NVML cannot say how much memory a GPU has: "):
        visible_gpus()


def test_a_machine_without_nvml_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise nvml.NVMLError(nvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(nvml, "nvmlInit", missing)
    assert visible_gpus() == []
