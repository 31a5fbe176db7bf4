"""Softmax attention through torch's own fused kernels: exact, and runs everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenft.capabilities import AttentionBackend

if TYPE_CHECKING:
    from torch import Tensor

    from qwenft.kernels.layout import SequenceLayout


class SdpaAttention(AttentionBackend):
    """torch.nn.functional.scaled_dot_product_attention, one document at a time."""

    name = "sdpa"
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
        """Attend by :func:`qwenft.kernels.attention.sdpa_attention`, whose arguments these are."""
        from qwenft.kernels.attention import sdpa_attention

        return sdpa_attention(query, key, value, layout=layout, scale=scale, causal=causal)
