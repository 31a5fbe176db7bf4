"""Which attention backends a run uses."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs

from qwenft.capabilities import AttentionBackend, LinearAttentionBackend
from qwenft.specs.base import Check, spec


def _slot(kind: type, example: str) -> Check:
    def accepts(value: Any) -> bool:
        return isinstance(value, kind) or (isinstance(value, str) and value != "")

    return Check(accepts, f'a backend\'s name, "auto", or an object of {kind.__name__}', example)


@spec
@attrs.frozen
class AttentionSpec:
    """A backend for each slot: its name, an object, or "auto", the best exact one of the machine.

    Args:
        full: for the full-attention layers.
        linear: for the Gated DeltaNet layers, conv and scan both.
        vision: for the layers of the vision tower, which sees images and never the text.

    Examples:
        >>> AttentionSpec(full="eager").linear
        'auto'
    """

    #: Arguments of other trainers, each refused with what stands for it.
    RENAMED: ClassVar[dict[str, str]] = {
        "flash_attention": 'full="flash_attention_2"',
        "sdp_attention": 'full="sdpa"',
        "flex_attention": 'full="flex_attention"',
        "xformers_attention": 'full="sdpa"',
        "eager_attention": 'full="eager"',
        "attn_implementation": 'full="sdpa"',
    }

    full: str | AttentionBackend = attrs.field(
        default="auto", validator=_slot(AttentionBackend, 'AttentionSpec(full="sdpa")')
    )
    linear: str | LinearAttentionBackend = attrs.field(
        default="auto", validator=_slot(LinearAttentionBackend, 'AttentionSpec(linear="torch")')
    )
    vision: str | AttentionBackend = attrs.field(
        default="auto", validator=_slot(AttentionBackend, 'AttentionSpec(vision="sdpa")')
    )
