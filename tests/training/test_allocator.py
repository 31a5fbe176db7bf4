from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# In a process of its own: what an allocator does depends on all that went before.
SCRIPT = """
import pathlib, torch
from qwenft.training.allocator import keep_freed_memory, return_freed_memory

def resident():
    line = next(l for l in pathlib.Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS"))
    return int(line.split()[1]) >> 10

def freed():
    before = resident()
    tensor = torch.ones(64 * 2**20)  # 256 MiB
    held = resident() - before
    del tensor
    return held, resident() - before

base = resident()
plain = freed()
keep_freed_memory()
kept = freed()
return_freed_memory()
print(*plain, *kept, resident() - base)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is a setting of glibc")
def test_freed_memory_is_kept_and_given_back():
    """A large tensor's memory goes back at once before, stays in the process after, and goes back when told."""
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    held, left, held_kept, left_kept, after = map(int, run.stdout.split())
    assert held > 250
    assert left < 10
    assert held_kept > 250
    assert left_kept > 250
    assert after < 60
