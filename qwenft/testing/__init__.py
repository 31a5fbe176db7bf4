"""Tools for testing: tiny checkpoints, a base that has learned something, stock transformers, suites."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenft.testing.base import tiny_base
    from qwenft.testing.checkpoint import TinySizes, tiny_checkpoint
    from qwenft.testing.conformance import check_attention, check_linear_attention
    from qwenft.testing.memory import measured_peak
    from qwenft.testing.stock import StockResult, stock_logits
    from qwenft.testing.tokenizer import train_tokenizer

__all__ = [
    "StockResult",
    "TinySizes",
    "check_attention",
    "check_linear_attention",
    "measured_peak",
    "stock_logits",
    "tiny_base",
    "tiny_checkpoint",
    "train_tokenizer",
]

_HOMES = {
    "StockResult": "stock",
    "TinySizes": "checkpoint",
    "check_attention": "conformance",
    "check_linear_attention": "conformance",
    "measured_peak": "memory",
    "stock_logits": "stock",
    "tiny_base": "base",
    "tiny_checkpoint": "checkpoint",
    "train_tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that the suites (which need torch) load only when asked for, and so that
    # `python -m qwenft.testing.stock` is not imported by its own package first.
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
