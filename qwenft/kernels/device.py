"""Where tensors are computed with, for what is decided by it."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_planned: ContextVar[str | None] = ContextVar("planned device", default=None)


def device_type(tensor: Tensor) -> str:
    """Where a tensor is, or where a plan takes it to be: "cpu" or "cuda"."""
    return _planned.get() or tensor.device.type


@contextmanager
def planned_on(device: str) -> Iterator[None]:
    """Take all tensors to be on a device, whether there is one: for simulations, whose tensors hold nothing."""
    token = _planned.set(device)
    try:
        yield
    finally:
        _planned.reset(token)
