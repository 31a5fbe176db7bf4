"""Softmax attention written out: what the other backends are measured by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenft.capabilities import AttentionBackend

if TYPE_CHECKING:
    from torch import Tensor

    from qwenft.kernels.layout import SequenceLayout


class EagerAttention(AttentionBackend):
    """A masked softmax over all pairs of a document, in float32."""

    name = "eager"
    supports_packing = True
    uses_flash_lib = False

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: SequenceLayout,
        scale: float,
        causal: bool = True,
    ) -> Tensor:
        """Attend by :func:`qwenft.kernels.attention.eager_attention`, whose arguments these are."""
        from qwenft.kernels.attention import eager_attention

        return eager_attention(query, key, value, layout=layout, scale=scale, causal=causal)
