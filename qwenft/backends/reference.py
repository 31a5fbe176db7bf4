"""Gated DeltaNet token by token: what the other backends are measured by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenft.capabilities import LinearAttentionBackend

if TYPE_CHECKING:
    from torch import Tensor

    from qwenft.kernels.layout import SequenceLayout


class ReferenceDeltaRule(LinearAttentionBackend):
    """The loops of :mod:`qwenft.kernels.reference`: slow, and plain enough to check by eye."""

    name = "reference"
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
        """Convolve by :func:`qwenft.kernels.reference.short_conv_reference`, whose arguments these are."""
        from qwenft.kernels.reference import short_conv_reference

        return short_conv_reference(
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
        """Run :func:`qwenft.kernels.reference.gated_delta_rule_reference`, whose arguments these are."""
        from qwenft.kernels.reference import gated_delta_rule_reference

        return gated_delta_rule_reference(
            query,
            key,
            value,
            log_decay,
            beta,
            layout=layout,
            initial_state=initial_state,
            return_state=return_state,
        )
