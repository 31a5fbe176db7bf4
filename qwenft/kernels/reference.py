"""The formulas of Gated DeltaNet written as loops over tokens: slow, and easy to hold beside the paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from qwenft.kernels.checks import check_conv, check_delta_rule, compute_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from qwenft.kernels.layout import SequenceLayout

EPSILON = 1e-6


def gated_delta_rule_reference(
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
    """Run the gated delta rule token by token (arXiv:2412.06464, equation 10).

    S = exp(log_decay) S;  S = S + k (beta (v - S^T k))^T;  output = S^T q

    Args:
        query: [T, K, D], raw.
        key: [T, K, D], raw.
        value: [T, V, E].
        log_decay: [T, V], at most 0.
        beta: [T, V].
        layout: where the documents begin.
        initial_state: [N, V, D, E]; zeros where None.
        return_state: also return the state after each document.

    Returns:
        [T, V, E] in the dtype of ``value``, and [N, V, D, E] in float32 where asked.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    check_delta_rule((query, key, value, log_decay, beta), initial_state, layout)
    dtype = compute_dtype(value)
    group = value.shape[1] // key.shape[1]
    query_TVD = (l2norm(query.to(dtype)) * query.shape[-1] ** -0.5).repeat_interleave(group, dim=1)
    key_TVD = l2norm(key.to(dtype)).repeat_interleave(group, dim=1)
    value_TVE, beta_TV, decay_TV = value.to(dtype), beta.to(dtype), log_decay.to(dtype).exp()
    outputs, states = [], []
    for document, start in enumerate(layout.starts[:-1]):
        if initial_state is None:
            state_VDE = value_TVE.new_zeros(value.shape[1], key.shape[2], value.shape[2])
        else:
            state_VDE = initial_state[document].to(dtype)
        for t in range(start, layout.starts[document + 1]):
            state_VDE = decay_TV[t, :, None, None] * state_VDE
            recalled_VE = torch.einsum("vde,vd->ve", state_VDE, key_TVD[t])
            correction_VE = beta_TV[t, :, None] * (value_TVE[t] - recalled_VE)
            state_VDE = state_VDE + key_TVD[t, :, :, None] * correction_VE[:, None, :]
            outputs.append(torch.einsum("vde,vd->ve", state_VDE, query_TVD[t]))
        states.append(state_VDE)
    output = torch.stack(outputs).to(value.dtype)
    return (output, torch.stack(states)) if return_state else output


def l2norm(x: Tensor) -> Tensor:
    """``x`` over its length in the last dimension, with the epsilon of FLA and transformers under the root."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPSILON)


def short_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    layout: SequenceLayout,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve one document at a time: each output is the sum of W inputs times their taps.

    Written out, since conv1d on a GPU rounds float32 to TF32 unless told otherwise.

    Args:
        x: [T, C].
        weight: [C, W]; the last tap meets the token itself.
        bias: [C] or None.
        layout: where the documents begin.
        activation: "silu" or None.
        initial_state: [N, W - 1, C], the inputs before each document's first token; zeros where None.
        return_state: also return the last W - 1 inputs of each document.

    Returns:
        [T, C] in the dtype of ``x``, and [N, W - 1, C] where asked.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    check_conv((x, weight, bias), initial_state, layout, activation=activation)
    dtype = compute_dtype(x)
    channels, width = weight.shape
    taps_CW, bias_C = weight.to(dtype), 0 if bias is None else bias.to(dtype)
    outputs, states = [], []
    for document, start in enumerate(layout.starts[:-1]):
        if initial_state is None:
            before = x.new_zeros(width - 1, channels, dtype=dtype)
        else:
            before = initial_state[document].to(dtype)
        inputs = torch.cat([before, x[start : layout.starts[document + 1]].to(dtype)])
        outputs.append((inputs.unfold(0, width, 1) * taps_CW).sum(-1) + bias_C)
        states.append(inputs[len(inputs) - width + 1 :])
    output = torch.cat(outputs)
    output = (functional.silu(output) if activation == "silu" else output).to(x.dtype)
    return (output, torch.stack(states).to(x.dtype)) if return_state else output
