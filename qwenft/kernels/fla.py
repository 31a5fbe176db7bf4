"""Gated DeltaNet by the Triton kernels of flash-linear-attention (FLA), imported when a function here runs.

FLA's letters are others: its H, HV, K and V are our K, V, D and E. Its L2 norm adds 1e-6 under the root, and a key
head serves V / K value heads side by side, as here (fla.ops.gated_delta_rule.chunk and fla.modules.norm.l2norm,
version 0.6). In bfloat16 it rounds the state after each 64 tokens of a document; in float32 its products are TF32
on a GPU, right to three digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from qwenft.kernels.checks import check_conv, check_delta_rule

if TYPE_CHECKING:
    from torch import Tensor

    from qwenft.kernels.layout import SequenceLayout


def fla_delta_rule(
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
    """Run the gated delta rule over each document by fla.ops.gated_delta_rule.chunk_gated_delta_rule.

    Args:
        query: [T, K, D], raw; computed in the dtype of ``value``.
        key: [T, K, D], raw, likewise; value head v reads key head v // (V / K).
        value: [T, V, E], bfloat16 or float32.
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
    _check_dtype("value", value)
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    output, state = chunk_gated_delta_rule(
        q=query.to(value.dtype)[None],
        k=key.to(value.dtype)[None],
        v=value[None],
        g=log_decay[None],
        beta=beta[None],
        scale=key.shape[-1] ** -0.5,
        initial_state=initial_state,
        output_final_state=return_state,
        use_qk_l2norm_in_kernel=True,
        **_boundaries(layout),
    )
    return (output[0], state) if return_state else output[0]


def fla_short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    layout: SequenceLayout,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel causally over W taps, from each document's start, by fla.modules.causal_conv1d.

    Args:
        x: [T, C], bfloat16 or float32.
        weight: [C, W]; the last tap meets the token itself.
        bias: [C] or None.
        layout: where the documents begin.
        activation: "silu" or None.
        initial_state: [N, W - 1, C], the inputs before each document's first token; zeros where None.
        return_state: also return the last W - 1 inputs of each document, with those of the initial state where
            the document is shorter.

    Returns:
        [T, C] in the dtype of ``x``, and [N, W - 1, C] where asked.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    check_conv((x, weight, bias), initial_state, layout, activation=activation)
    _check_dtype("x", x)
    from fla.modules.causal_conv1d import causal_conv1d

    output, cache = causal_conv1d(
        x=x[None],
        weight=weight,
        bias=bias,
        initial_state=None if initial_state is None else _to_cache(initial_state),
        output_final_state=return_state,
        activation=activation,
        # Named, although it is the default: the others need the causal-conv1d package.
        backend="triton",
        **_boundaries(layout),
    )
    return (output[0], _from_cache(cache)) if return_state else output[0]


def _check_dtype(name: str, x: Tensor) -> None:
    """Refuse what FLA computes wrongly: NaN gradients in float16, float32 precision in float64.

    Raises:
        ValueError: ``x`` is refused.
    """
    if x.dtype not in (torch.bfloat16, torch.float32):
        msg = f"{name}: expected bfloat16 or float32, got {x.dtype}, which FLA's kernels get wrong"
        raise ValueError(msg)


def _boundaries(layout: SequenceLayout) -> dict[str, Tensor]:
    """FLA's arguments for the documents' boundaries, in int64: the LongTensor of its signatures.

    The copy on the host spares a wait for the GPU, and FLA keeps what it derives from these tensors by their
    identity: they must be the same objects in every layer.
    """
    return layout.derived(
        "fla boundaries",
        lambda: {"cu_seqlens": layout.cu_seqlens.long(), "cu_seqlens_cpu": torch.tensor(layout.starts)},
    )


def _to_cache(state: Tensor) -> Tensor:
    """[N, W - 1, C] as FLA's cache [N, C, W], whose first column no output reads."""
    return functional.pad(state.transpose(1, 2), (1, 0))


def _from_cache(cache: Tensor) -> Tensor:
    """The inverse of :func:`_to_cache`."""
    return cache[:, :, 1:].transpose(1, 2).contiguous()
