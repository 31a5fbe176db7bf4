"""The short causal convolution of Gated DeltaNet over packed documents, as one depthwise convolution of torch.

    y[t] = silu(bias + sum_w weight[:, w] x[t - (W - 1) + w])

The stream is convolved as if it were one document, and then the sums that reach over a boundary, those of each
document's first W - 1 tokens, are replaced: they are computed in a short stream of their own, in which W - 1 rows
stand before each document, zeros or its initial state. The backward pass computes the sums again, so that nothing
but the inputs is saved; its gradient of x is a convolution by the taps in reverse, in which each document's last
W - 1 tokens are replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qwenft.kernels.checks import check_conv, compute_dtype, exact
from qwenft.kernels.device import device_type

if TYPE_CHECKING:
    from torch import Tensor

    from qwenft.kernels.layout import SequenceLayout

# Whose products are summed at once on a CPU, where they stay in its cache.
BLOCK_ROWS = 64


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
    reach = weight.shape[1] - 1
    leads = None if initial_state is None else initial_state.flatten(0, 1)
    alone = reach == 0 or (len(layout) == 1 and leads is None)
    output = _ShortConv.apply(None if alone else _Edges.of(layout, reach), activation, x, weight, bias, leads)
    if not return_state:
        return output
    if leads is None:
        leads = x.new_zeros(len(layout) * reach, x.shape[1])
    state = torch.cat([x, leads.to(x.dtype)])[_last_inputs(layout, reach)]
    return output, state.view(len(layout), reach, x.shape[1])


@attrs.frozen(eq=False)
class _Edges:
    """The E tokens on either side of the boundaries, at most W - 1 of a document, and a stream for them alone.

    Args:
        first: [E] int64, the first tokens of each document.
        last: [E] int64, the last ones.
        rows: [E] int64, where either stand in a stream in which W - 1 others lead each document.
        leads: [N (W - 1)] int64, where those stand.
    """

    first: Tensor
    last: Tensor
    rows: Tensor
    leads: Tensor

    @classmethod
    def of(cls, layout: SequenceLayout, reach: int) -> _Edges:
        """Of a layout, made once for it; ``reach`` is W - 1."""
        return layout.derived(("edges", reach), lambda: cls._build(layout, reach))

    @classmethod
    def _build(cls, layout: SequenceLayout, reach: int) -> _Edges:
        lengths, places, documents = (
            torch.tensor(layout.lengths),
            layout.position_ids.cpu(),
            layout.document_ids.cpu(),
        )
        counts = lengths.clamp(max=reach)
        rows = torch.arange(int(counts.sum())) + (documents[places < reach] + 1) * reach
        starts = (counts + reach).cumsum(0) - counts - reach
        parts = {
            "first": (places < reach).nonzero().flatten(),
            "last": (lengths[documents] - places <= reach).nonzero().flatten(),
            "rows": rows,
            "leads": (starts[:, None] + torch.arange(reach)).flatten(),
        }
        return cls(**{name: part.to(layout.device) for name, part in parts.items()})

    def led(self, x: Tensor, leads: Tensor | None = None) -> Tensor:
        """The stream of x [E, C] and of leads [N (W - 1), C], zeros where None."""
        stream = x.new_zeros(len(self.rows) + len(self.leads), x.shape[1]).index_copy_(0, self.rows, x)
        return stream if leads is None else stream.index_copy_(0, self.leads, leads.to(x.dtype))


def _last_inputs(layout: SequenceLayout, reach: int) -> Tensor:
    """[N (W - 1)] int64: the last inputs of each document, among the T tokens followed by the leads."""
    starts, ends = (torch.tensor(bounds)[:, None] for bounds in (layout.starts[:-1], layout.starts[1:]))
    tokens = ends + torch.arange(-reach, 0)
    # Of a document shorter than that, the last of its leads are among them.
    leads = layout.total + torch.arange(len(layout))[:, None] * reach + (tokens - starts + reach)
    return torch.where(tokens >= starts, tokens, leads).flatten().to(layout.device)


class _ShortConv(torch.autograd.Function):
    """The convolution and its gradients; ``edges`` is None where no sum reaches over a boundary."""

    @staticmethod
    def forward(
        ctx: Any, edges: _Edges | None, activation: str | None, x: Tensor, weight: Tensor, *optional: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *optional)
        ctx.edges, ctx.activation = edges, activation
        sums = _sums(edges, x, weight, *optional)
        return (functional.silu(sums, inplace=True) if activation == "silu" else sums).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, leads = ctx.saved_tensors
        edges: _Edges | None = ctx.edges
        _, _, _, wants_weight, wants_bias, wants_leads = ctx.needs_input_grad
        grad = grad.to(compute_dtype(x))
        if ctx.activation == "silu":
            sums = _sums(edges, x, weight, bias, leads)
            grad = torch.ops.aten.silu_backward.grad_input(grad, sums, grad_input=sums)
        grad_weight = None
        if wants_weight:  # a frozen one, as beside LoRA, is half of the work
            grad_weight = _tap_gradients(edges, grad, x.to(grad.dtype), leads, weight.shape[1]).to(weight.dtype)
        reach, taps = weight.shape[1] - 1, weight.to(grad.dtype).flip(1)
        grad_x = _convolve(grad, taps)[reach:]
        grad_leads = torch.zeros_like(leads) if wants_leads else None
        if edges is not None:
            grad_x[edges.last] = _convolve(edges.led(grad[edges.last]), taps)[reach:][edges.rows]
            if wants_leads:
                grad_leads = _convolve(edges.led(grad[edges.first]), taps)[reach:][edges.leads].to(leads.dtype)
        return (
            None,
            None,
            grad_x.to(x.dtype),
            grad_weight,
            grad.sum(0).to(bias.dtype) if wants_bias else None,
            grad_leads,
        )


def _sums(edges: _Edges | None, x: Tensor, weight: Tensor, bias: Tensor | None, leads: Tensor | None) -> Tensor:
    """What is before the silu: [T, C]."""
    x = x.to(compute_dtype(x))
    taps, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    sums = _convolve(x, taps, bias)[: len(x)]
    if edges is not None:
        sums[edges.first] = _convolve(edges.led(x[edges.first], leads), taps, bias)[edges.rows]
    return sums


def _tap_gradients(edges: _Edges | None, grad: Tensor, x: Tensor, leads: Tensor | None, width: int) -> Tensor:
    """The gradient of the taps [C, W] from that of the sums [T, C]."""
    if edges is None:
        return _products(grad, x, width)
    inside = _products(grad.index_fill(0, edges.first, 0), x, width)
    return inside + _products(edges.led(grad[edges.first]), edges.led(x[edges.first], leads), width)


def _products(grad: Tensor, x: Tensor, width: int) -> Tensor:
    """Gradients times the inputs W - 1 to 0 rows before them, summed over the stream: [C, W]."""
    size = BLOCK_ROWS if device_type(grad) == "cpu" else len(grad)
    sums = grad.new_zeros(width, grad.shape[1])
    for start in range(0, len(grad), size):
        for shift in range(width):
            first, stop = max(start, shift), min(start + size, len(grad))
            sums[width - 1 - shift] += (grad[first:stop] * x[first - shift : stop - shift]).sum(0)
    return sums.T


def _convolve(stream: Tensor, taps: Tensor, bias: Tensor | None = None) -> Tensor:
    """[T, C] between W - 1 zeros on either side, by taps [C, W]: [T + W - 1, C].

    The stream is an image of one row of T pixels in channels-last, as it lies in memory; a convolution in one
    dimension would first turn it round. Without cuDNN, which may round float32 to TF32.
    """
    channels, width = taps.shape
    image = stream.contiguous().view(1, 1, -1, channels).permute(0, 3, 1, 2)
    with exact(stream), torch.backends.cudnn.flags(enabled=False):
        result = functional.conv2d(image, taps[:, None, None], bias, padding=(0, width - 1), groups=channels)
    return result.permute(0, 2, 3, 1).reshape(-1, channels)
