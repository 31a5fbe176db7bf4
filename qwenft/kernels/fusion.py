"""Element-wise work between products, compiled into few kernels by torch.compile where that is asked for."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache, wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from torch._dynamo.utils import cumulative_time_spent_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

P = ParamSpec("P")
R = TypeVar("R")

# Not a context variable: autograd runs the backward pass of a GPU in threads of its own.
_asked = False


@contextmanager
def fusion(*, asked: bool) -> Iterator[None]:
    """Let fusible functions be compiled inside, or not."""
    global _asked  # noqa: PLW0603 - see above
    before, _asked = _asked, asked
    try:
        yield
    finally:
        _asked = before


def compile_seconds() -> float:
    """What torch.compile took of this process so far."""
    return float(cumulative_time_spent_ns.get("entire_frame_compile", 0) / 1e9)


def fusible(function: Callable[P, R]) -> Callable[P, R]:
    """A function of tensors that is compiled where :func:`fusion` asks for it: once, for all sizes."""

    @cache
    def compiled() -> Callable[P, R]:
        return torch.compile(function, dynamic=True)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return compiled()(*args, **kwargs) if _asked else function(*args, **kwargs)

    return call
