"""Attention backends, one a file, and the names that specs use for them."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeVar

from qwenft.backends.eager import EagerAttention
from qwenft.backends.reference import ReferenceDeltaRule
from qwenft.backends.sdpa import SdpaAttention
from qwenft.backends.torch import TorchDeltaRule
from qwenft.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qwenft.capabilities import AttentionBackend, LinearAttentionBackend

T = TypeVar("T")

# A new backend is one file, one line here and one in __all__.
_FULL: dict[str, type[AttentionBackend]] = {kind.name: kind for kind in (EagerAttention, SdpaAttention)}
_LINEAR: dict[str, type[LinearAttentionBackend]] = {
    kind.name: kind for kind in (TorchDeltaRule, ReferenceDeltaRule)
}

FULL_NAMES = tuple(_FULL)
LINEAR_NAMES = tuple(_LINEAR)


def full(name: str) -> AttentionBackend:
    """The full-attention backend of this name.

    Args:
        name: one of ``FULL_NAMES``.

    Raises:
        SpecError: no backend has this name.

    Examples:
        >>> full("sdpa")
        SdpaAttention()
    """
    return _find("full", name, _FULL)()


def linear(name: str) -> LinearAttentionBackend:
    """The linear-attention backend of this name.

    Args:
        name: one of ``LINEAR_NAMES``.

    Raises:
        SpecError: no backend has this name.

    Examples:
        >>> linear("torch")
        TorchDeltaRule()
    """
    return _find("linear", name, _LINEAR)()


def _find(slot: str, name: str, known: Mapping[str, T]) -> T:
    if name in known:
        return known[name]
    nearest = get_close_matches(str(name), known, n=1, cutoff=0.5)
    msg = f"attention.{slot}: no backend is called {name!r}; known names: {', '.join(known)}"
    raise SpecError(
        msg,
        fix=f'{slot}="{nearest[0]}"' if nearest else f'{slot}="auto"',
        got=name,
        expected=tuple(known),
    )


__all__ = [
    "FULL_NAMES",
    "LINEAR_NAMES",
    "EagerAttention",
    "ReferenceDeltaRule",
    "SdpaAttention",
    "TorchDeltaRule",
    "full",
    "linear",
]
