"""Attention backends, one a file, and the names that specs use for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from qwenft.backends.eager import EagerAttention
from qwenft.backends.reference import ReferenceDeltaRule
from qwenft.backends.sdpa import SdpaAttention
from qwenft.backends.torch import TorchDeltaRule
from qwenft.errors import SpecError, nearest

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


def automatic(slot: str) -> tuple[AttentionBackend, ...] | tuple[LinearAttentionBackend, ...]:
    """What "auto" chooses from in the slot "full" or "linear", best first; the last can always."""
    return (SdpaAttention(), EagerAttention()) if slot == "full" else (TorchDeltaRule(), ReferenceDeltaRule())


def _find(slot: str, name: str, known: Mapping[str, T]) -> T:
    if name in known:
        return known[name]
    raise SpecError(
        f"attention.{slot}: no backend is called {name!r}{nearest(name, known) or '.'} Known: {', '.join(known)}",
        fix=f'AttentionSpec({slot}="auto")',
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
    "automatic",
    "full",
    "linear",
]
