"""The memory that a process takes, and what is said where there is too little."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

import torch

from qwenft.data.stream import places_text
from qwenft.errors import OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenft.data.stream import Batch
    from qwenft.training.engine import Prepared


def peak_bytes(device: str) -> int:
    """The most memory so far: of the GPU's tensors, or of the process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_shortage(error: BaseException) -> bool:
    """Whether torch or Python did not get the memory that it asked for; of a CPU torch says so in words alone."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def shortage(prepared: Prepared, batches: Sequence[Batch], error: BaseException) -> OutOfMemoryError:
    """The error of a step that found too little memory: with its micro-batch, and what is in use."""
    at = prepared.micro_batch
    where = "the update, behind its micro-batches"
    documents: tuple[tuple[str, int], ...] = ()
    tokens = 0
    if at is not None:
        documents, tokens = tuple(at.documents), at.layout.total
        number = next(place for place, batch in enumerate(batches, start=1) if batch is at)
        where = f"micro-batch {number} of {len(batches)}: {tokens:,} tokens, of {places_text(documents)}"
    used = {"peak_bytes": peak_bytes(prepared.device)}
    if prepared.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        used |= {"reserved_bytes": torch.cuda.max_memory_reserved(), "free_bytes": free, "total_bytes": total}
    return OutOfMemoryError(
        f"step {prepared.steps_done + 1}: out of memory in {where}: {str(error).strip().splitlines()[0]}",
        step=prepared.steps_done + 1,
        documents=documents,
        tokens=tokens,
        used=used,
        planned=None,
    )
