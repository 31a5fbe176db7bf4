"""Algorithms that give the same bits again, for as long as they are asked for."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def deterministic_algorithms(*, asked: bool) -> Iterator[None]:
    """Let torch use deterministic algorithms alone; an operation that has none raises RuntimeError.

    Args:
        asked: False changes nothing.
    """
    if not asked:
        yield
        return
    # cuBLAS takes a fixed workspace for a fixed order; it reads this when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # a check on kernels, not a part of the result
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filled
