"""Attention backends, one a file, and the names that specs use for them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from qwenft.backends.eager import EagerAttention
from qwenft.backends.fla import FlaDeltaRule
from qwenft.backends.flash import FlashAttention
from qwenft.backends.flex import FlexAttention
from qwenft.backends.hub import HubAttention
from qwenft.backends.reference import ReferenceDeltaRule
from qwenft.backends.sdpa import SdpaAttention
from qwenft.backends.torch import TorchDeltaRule
from qwenft.backends.transformers import StockDeltaRule
from qwenft.errors import SpecError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable

    from qwenft.capabilities import AttentionBackend, LinearAttentionBackend

# A new backend is one file, one line here and one in __all__.
_FULL: dict[str, Callable[[], AttentionBackend]] = {
    "eager": EagerAttention,
    "sdpa": SdpaAttention,
    "flex_attention": FlexAttention,
    "flash_attention_2": partial(FlashAttention, 2),
    "flash_attention_3": partial(FlashAttention, 3),
    "flash_attention_4": partial(FlashAttention, 4),
}
_LINEAR: dict[str, Callable[[], LinearAttentionBackend]] = {
    "torch": TorchDeltaRule,
    "fla": FlaDeltaRule,
    "reference": ReferenceDeltaRule,
    "transformers": StockDeltaRule,
}

FULL_NAMES = tuple(_FULL)
LINEAR_NAMES = tuple(_LINEAR)

# Short names that others use. They are refused: which version of flash attention runs must be said in full.
_ALIASES = {
    "flash": "flash_attention_2",
    "flash_attn": "flash_attention_2",
    "flash_attention": "flash_attention_2",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
    "fa4": "flash_attention_4",
    "flex": "flex_attention",
    "sdp": "sdpa",
    "xformers": "sdpa",
    "flash_linear_attention": "fla",
    "stock": "transformers",
}


def full(name: str) -> AttentionBackend:
    """The full-attention backend of this name.

    Args:
        name: one of ``FULL_NAMES``, or a hub kernel as "org/name@commit".

    Raises:
        SpecError: no backend has this name, or a hub kernel is not pinned to a commit.

    Examples:
        >>> full("sdpa")
        SdpaAttention()
    """
    return find("full", name)


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
    return find("linear", name)


def find(slot: str, name: str) -> Any:
    """The backend of this name for a slot: as :func:`linear` for "linear", as :func:`full` for the others.

    Raises:
        SpecError: see there; the message names the slot.
    """
    known = _LINEAR if slot == "linear" else _FULL
    if "/" in name and slot != "linear":
        return HubAttention.parse(name)
    if name in known:
        return known[name]()
    meant = _ALIASES.get(name)
    hint = f"; its name here is {meant!r}." if meant in known else nearest(name, known) or "."
    raise SpecError(
        f"attention.{slot}: no backend is called {name!r}{hint} Known: {', '.join(known)}",
        fix=f'AttentionSpec({slot}="{meant if meant in known else "auto"}")',
        got=name,
        expected=tuple(known),
    )


def automatic(slot: str) -> tuple[Any, ...]:
    """What "auto" chooses from in a slot, best first; the last can always.

    flash_attention_4, which is in beta, and flex_attention, which compiles its kernel first, are used by name.
    """
    if slot == "linear":
        return FlaDeltaRule(), TorchDeltaRule(), ReferenceDeltaRule()
    return FlashAttention(3), FlashAttention(2), SdpaAttention(), EagerAttention()


__all__ = [
    "FULL_NAMES",
    "LINEAR_NAMES",
    "EagerAttention",
    "FlaDeltaRule",
    "FlashAttention",
    "FlexAttention",
    "HubAttention",
    "ReferenceDeltaRule",
    "SdpaAttention",
    "StockDeltaRule",
    "TorchDeltaRule",
    "automatic",
    "find",
    "full",
    "linear",
]
