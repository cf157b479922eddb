"""Memory that a process frees is not mapped anew when it allocates as much again."""

import subprocess
import sys

import pytest

COUNT = """
import resource, sys
from cluster.actors.freed_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
def use():
    return bytearray(48 << 20)  # glibc's own threshold never rises above 32 MiB
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's parameters")
def test_freed_memory_is_used_again_without_a_page_fault() -> None:
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", COUNT, word], capture_output=True, check=True).stdout)
        for word in ("keep", "return")
    )
    assert kept < 20
    assert returned > 60  # 24 huge pages each time, or thousands of small ones
