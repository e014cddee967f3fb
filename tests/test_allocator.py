"""Memory that tensors leave behind."""

import os
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, torch
from hauberk.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
def test_memory_that_is_freed_is_used_again_without_new_pages():
    faults = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", _FAULTS, how],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for how in ("keep", "give back")
    }
    pages = 10 * 40_000_000 // os.sysconf("SC_PAGESIZE")  # half of what is written
    assert faults["keep"] < faults["give back"] - pages
