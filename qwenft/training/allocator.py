"""The C library's allocator, set for training: what a step frees is kept for the next one.

glibc maps large tensors anew for every use and gives them back after it; the operating system clears each page of
them again. For a tensor of 50 MB that takes several times as long as the multiplication that it is made for.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_NEVER, _LARGEST_KEPT = 2**31 - 1, 2**30


def keep_freed_memory() -> None:
    """Keep freed memory in this process, for tensors of up to 1 GiB; nothing is done where there is no glibc."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, _NEVER)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)


def return_freed_memory() -> None:
    """Give what is kept and free back to the operating system."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
