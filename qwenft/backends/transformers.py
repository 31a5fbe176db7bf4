"""Gated DeltaNet as stock transformers computes it: for comparison, one document at a time."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from qwenft.capabilities import Availability, LinearAttentionBackend

if TYPE_CHECKING:
    from torch import Tensor

    from qwenft.kernels.layout import SequenceLayout
    from qwenft.machine import Machine


class StockDeltaRule(LinearAttentionBackend):
    """The functions of transformers.models.qwen3_5.modeling_qwen3_5, whatever stands behind them.

    transformers chooses at import: FLA's rule and the causal_conv1d package where they can be imported, its own
    torch code elsewhere. None of these combinations keeps packed documents apart in both halves.
    """

    name = "transformers"
    supports_packing = False
    uses_flash_lib = False

    def availability(self, machine: Machine) -> Availability:
        """Everywhere but where FLA is importable without a GPU: transformers would choose it all the same."""
        if machine.device == "cpu" and importlib.util.find_spec("fla") is not None:
            reason = "transformers chooses flash-linear-attention wherever it can be imported, and it needs a GPU"
            return Availability(
                usable=False, reason=reason, remedy="pip uninstall flash-linear-attention fla-core"
            )
        return Availability(usable=True)

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
        """Convolve one document by ``causal_conv1d_fn``; arguments as in the base class.

        Raises:
            ValueError: the layout holds more than one document, or an argument does not fit it.
        """
        import torch
        from transformers.models.qwen3_5.modeling_qwen3_5 import causal_conv1d_fn

        from qwenft.kernels.checks import check_conv, check_single

        check_conv((x, weight, bias), initial_state, layout, activation=activation)
        check_single(layout, self.name)
        # A state is led in front and its outputs dropped, as the layer does with its cache.
        before = x.new_zeros(weight.shape[1] - 1, x.shape[1]) if initial_state is None else initial_state[0]
        inputs = torch.cat([before.to(x.dtype), x])
        seen = x if initial_state is None else inputs
        output = causal_conv1d_fn(seen.T[None], weight, bias, activation=activation)[0].T[-len(x) :]
        return (output, inputs[len(x) :][None]) if return_state else output

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
        """Run ``torch_chunk_gated_delta_rule`` over one document; arguments as in the base class.

        Raises:
            ValueError: the layout holds more than one document, or an argument does not fit it.
        """
        from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

        from qwenft.kernels.checks import check_delta_rule, check_single

        check_delta_rule((query, key, value, log_decay, beta), initial_state, layout)
        check_single(layout, self.name)
        output, state = torch_chunk_gated_delta_rule(
            query[None],
            key[None],
            value[None],
            g=log_decay[None],
            beta=beta[None],
            initial_state=initial_state,
            output_final_state=return_state,
            use_qk_l2norm_in_kernel=True,
        )
        return (output[0], state.float()) if return_state else output[0]
