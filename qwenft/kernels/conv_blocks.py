"""A packed stream in blocks, every document led by the W - 1 inputs before its first token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from qwenft.kernels.layout import SequenceLayout


@attrs.frozen(eq=False)
class Block:
    """The tokens ``start`` to ``stop``, and the R padded rows that their taps reach.

    Args:
        first: the earliest token among those rows, at most W - 1 before ``start``.
        start: the first token of the block.
        stop: the token after its last.
        inside: no lead is among the rows: they are the tokens ``first`` to ``stop``.
        rows: [R] int64, the token in each row; token 0 stands in for a lead.
        tokens: [stop - first] int64, the row of each token.
        outputs: [stop - start] int64, the place of each token of the block among the R - W + 1 outputs.
        leads: int64, the rows that are leads.
        lead_ids: int64, which of the N (W - 1) leads these are.
        width: W.
    """

    first: int
    start: int
    stop: int
    inside: bool
    rows: Tensor
    tokens: Tensor
    outputs: Tensor
    leads: Tensor
    lead_ids: Tensor
    width: int

    def pad(self, x: Tensor, leads: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The rows [R, C] out of x [T, C] and the leads [N (W - 1), C], which are zero where None."""
        if self.inside:
            return x[self.first : self.stop].to(dtype)
        padded = x.index_select(0, self.rows).to(dtype)
        if leads is None:
            return padded.index_fill_(0, self.leads, 0)
        return padded.index_copy_(0, self.leads, leads[self.lead_ids].to(dtype))

    def spread(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient [R - W + 1, C] of the outputs, zero where an output belongs to no token of the block."""
        grad = grad[self.start : self.stop].to(dtype)
        if self.inside:
            return grad
        outputs = grad.new_zeros(len(self.rows) - self.width + 1, grad.shape[1])
        return outputs.index_copy_(0, self.outputs, grad)


def conv_blocks(layout: SequenceLayout, width: int, size: int) -> tuple[Block, ...]:
    """Cut the stream of a layout, made once for it.

    Args:
        layout: where the documents begin.
        width: W.
        size: tokens a block.
    """
    return layout.derived(("conv_blocks", width, size), lambda: tuple(_cut(layout, width, size)))


def last_inputs(layout: SequenceLayout, width: int) -> Tensor:
    """[N (W - 1)] int64: the last inputs of each document, among the T tokens followed by the leads."""
    return layout.derived(("last_inputs", width), lambda: _last_inputs(layout, width))


def _cut(layout: SequenceLayout, width: int, size: int) -> list[Block]:
    tokens, inputs = _padded(layout, width)
    blocks = []
    for start in range(0, layout.total, size):
        stop = min(start + size, layout.total)
        base = int(tokens[start]) - (width - 1)
        inputs_here = inputs[base : int(tokens[stop - 1]) + 1]
        is_lead = inputs_here >= layout.total
        first = int(inputs_here[~is_lead][0])
        parts = {
            "rows": torch.where(is_lead, 0, inputs_here),
            "tokens": tokens[first:stop] - base,
            "outputs": tokens[start:stop] - base - (width - 1),
            "leads": is_lead.nonzero().flatten(),
            "lead_ids": inputs_here[is_lead] - layout.total,
        }
        inside = not is_lead.any()
        on_device = {name: part.to(layout.device) for name, part in parts.items()}
        blocks.append(Block(first=first, start=start, stop=stop, inside=inside, width=width, **on_device))
    return blocks


def _padded(layout: SequenceLayout, width: int) -> tuple[Tensor, Tensor]:
    """The padded row of each token, and what lies in each padded row; on the host."""
    lead = width - 1
    tokens = torch.arange(layout.total) + (layout.document_ids.cpu() + 1) * lead
    starts = torch.tensor(layout.starts[:-1]) + torch.arange(len(layout)) * lead
    leads = (starts[:, None] + torch.arange(lead)).flatten()
    inputs = torch.empty(layout.total + len(leads), dtype=torch.int64)
    inputs[tokens] = torch.arange(layout.total)
    inputs[leads] = layout.total + torch.arange(len(leads))
    return tokens, inputs


def _last_inputs(layout: SequenceLayout, width: int) -> Tensor:
    _, inputs = _padded(layout, width)
    ends = torch.tensor(layout.starts[1:]) + torch.arange(1, len(layout) + 1) * (width - 1)
    return inputs[(ends[:, None] + torch.arange(1 - width, 0)).flatten()].to(layout.device)
