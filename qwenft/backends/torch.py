"""Gated DeltaNet in plain PyTorch, chunked: runs everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenft.capabilities import LinearAttentionBackend

if TYPE_CHECKING:
    from torch import Tensor

    from qwenft.kernels.layout import SequenceLayout


class TorchDeltaRule(LinearAttentionBackend):
    """The chunked rule and the short convolution of :mod:`qwenft.kernels`."""

    name = "torch"
    supports_packing = True
    uses_flash_lib = False

    def short_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        layout: SequenceLayout,
        activation: str | None = "silu",
        initial_state: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Convolve by :func:`qwenft.kernels.short_conv.short_conv`, whose arguments these are."""
        from qwenft.kernels.short_conv import short_conv

        return short_conv(
            x,
            weight,
            bias,
            layout=layout,
            activation=activation,
            initial_state=initial_state,
            return_state=return_state,
        )

    def delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        *,
        layout: SequenceLayout,
        initial_state: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run :func:`qwenft.kernels.gated_delta_rule.gated_delta_rule`, whose arguments these are."""
        from qwenft.kernels.gated_delta_rule import gated_delta_rule

        return gated_delta_rule(
            query,
            key,
            value,
            log_decay,
            beta,
            layout=layout,
            initial_state=initial_state,
            return_state=return_state,
        )
