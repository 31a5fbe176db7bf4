"""The short causal convolution of Gated DeltaNet over packed documents, as shifted multiply-adds.

Every document is led by W - 1 rows: zeros, or its initial state. Over that padded stream

    y[p] = silu(bias + sum_w weight[:, w] x[p - (W - 1) + w])

needs no boundary: a tap that would reach into the document before meets the rows in between. The padded stream is
never built whole, only a block of it at a time that stays in the processor's cache, and a block inside a document
is no copy. The backward pass computes the sum before the silu again, so that nothing but the inputs is saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qwenft.kernels.checks import check_conv, compute_dtype
from qwenft.kernels.conv_blocks import conv_blocks, last_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from qwenft.kernels.conv_blocks import Block
    from qwenft.kernels.layout import SequenceLayout

# Of one block on a CPU; some five arrays of this size are in use at a time.
BLOCK_BYTES = 1 << 21


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    layout: SequenceLayout,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel causally over W taps, from each document's start.

    Computes in float32 (float64 for float64 inputs), whatever the dtype of ``weight``.

    Args:
        x: [T, C].
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
    channels, width = weight.shape
    size = max(1, BLOCK_BYTES // (4 * channels)) if x.device.type == "cpu" else layout.total
    leads = None if initial_state is None else initial_state.flatten(0, 1)
    output = _ShortConv.apply(conv_blocks(layout, width, size), activation, x, weight, bias, leads)
    if not return_state:
        return output
    if leads is None:
        leads = x.new_zeros(len(layout) * (width - 1), channels)
    state = torch.cat([x, leads.to(x.dtype)])[last_inputs(layout, width)]
    return output, state.view(len(layout), width - 1, channels)


def _convolve(padded: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """[R, C] by taps [W, C]: [R - W + 1, C]."""
    count = len(padded) - len(taps) + 1
    outputs = padded[:count] * taps[0] if bias is None else torch.addcmul(bias, padded[:count], taps[0])
    for shift in range(1, len(taps)):
        outputs.addcmul_(padded[shift : shift + count], taps[shift])
    return outputs


class _ShortConv(torch.autograd.Function):
    """The convolution block by block, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: tuple[Block, ...],
        activation: str | None,
        x: Tensor,
        weight: Tensor,
        *optional: Tensor | None,
    ) -> Tensor:
        bias, leads = optional
        ctx.save_for_backward(x, weight, bias, leads)
        ctx.blocks, ctx.activation = blocks, activation
        dtype = compute_dtype(x)
        taps, bias = weight.to(dtype).T.contiguous(), None if bias is None else bias.to(dtype)
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        for block in blocks:
            outputs = _convolve(block.pad(x, leads, dtype), taps, bias)
            if not block.inside:
                outputs = outputs.index_select(0, block.outputs)
            result[block.start : block.stop] = functional.silu(outputs) if activation == "silu" else outputs
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_result: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, leads = ctx.saved_tensors
        dtype = compute_dtype(x)
        taps, cast_bias = weight.to(dtype).T.contiguous(), None if bias is None else bias.to(dtype)
        grad_x = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        grad_leads = None if leads is None else torch.zeros_like(leads, dtype=dtype)
        wants_weight = ctx.needs_input_grad[3]  # a frozen one, as beside LoRA, is half of the work
        grad_taps, grad_bias = torch.zeros_like(taps), torch.zeros_like(taps[0])
        for block in ctx.blocks:
            padded = block.pad(x, leads, dtype)
            grad = block.spread(grad_result, dtype)
            if ctx.activation == "silu":
                grad = torch.ops.aten.silu_backward(grad, _convolve(padded, taps, cast_bias))
            if wants_weight:
                grad_taps += torch.stack(
                    [(grad * padded[shift : shift + len(grad)]).sum(0) for shift in range(len(taps))]
                )
            if bias is not None:
                grad_bias += grad.sum(0)
            # A block inside a document writes into the stream in place, another through its own padded rows; both
            # add to the rows before ``start``, which the blocks before have written.
            grad_padded = grad_x[block.first : block.stop] if block.inside else torch.empty_like(padded)
            lead = len(taps) - 1
            torch.mul(grad, taps[lead], out=grad_padded[lead:])
            if not block.inside:
                grad_padded[:lead] = 0
            for shift, tap in enumerate(taps[:lead]):
                grad_padded[shift : shift + len(grad)].addcmul_(grad, tap)
            if not block.inside:
                by_token = grad_padded.index_select(0, block.tokens)
                grad_x[block.first : block.start] += by_token[: block.start - block.first]
                grad_x[block.start : block.stop] = by_token[block.start - block.first :]
                if grad_leads is not None:
                    grad_leads.index_add_(0, block.lead_ids, grad_padded.index_select(0, block.leads))
        return (
            None,
            None,
            grad_x.to(x.dtype),
            grad_taps.T.to(weight.dtype) if wants_weight else None,
            None if bias is None else grad_bias.to(bias.dtype),
            None if grad_leads is None else grad_leads.to(leads.dtype),
        )
