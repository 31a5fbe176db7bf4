"""Results that are cheaper to make again in backward than to keep."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


@contextmanager
def made_again(x: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Let nothing inside keep ``x``, or views of it, for backward: it is made again there.

    What ``make`` needs is kept instead, so it should be what others keep anyway. Where hooks on saved tensors are
    set already, as by activation checkpointing, it is left to them.

    Args:
        x: contiguous.
        make: gives x anew, to the bit, in a storage of its own.
    """
    # torch.autograd.graph.saved_tensors_hooks: those that are set last win, and nothing public tells of others.
    others = torch._C._autograd._top_saved_tensors_default_hooks(True)  # noqa: SLF001 - see above
    if others is not None or not torch.is_grad_enabled():
        yield
        return
    # Not by its address: tensors of a simulation have none.
    storage, dtype, device = x.untyped_storage()._cdata, x.dtype, x.device  # noqa: SLF001
    made: weakref.ref[torch.UntypedStorage] | None = None

    def pack(saved: Tensor) -> Any:
        if saved.untyped_storage()._cdata != storage:  # noqa: SLF001
            return saved
        return saved.storage_offset(), saved.shape, saved.stride()

    def unpack(kept: Any) -> Tensor:
        nonlocal made
        if not isinstance(kept, tuple):
            return kept
        # As long as one of the views that a node keeps is in use, the others share its storage.
        data = None if made is None else made()
        if data is None:
            with torch.no_grad():
                data = make().untyped_storage()
            made = weakref.ref(data)
        return torch.empty(0, dtype=dtype, device=device).set_(data, *kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
