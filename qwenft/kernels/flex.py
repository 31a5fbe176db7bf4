"""Softmax attention through torch's FlexAttention (arXiv:2412.05496), under any rule of who sees whom.

On a GPU the stream goes through one compiled kernel, which leaves out the blocks of 128 x 128 pairs in which
nobody sees anybody. On a CPU torch computes FlexAttention by a masked softmax over all pairs and refuses its
backward pass: there the stream goes by a few documents at a time, and the backward pass is written out here.
"""

from __future__ import annotations

import functools
import warnings
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from qwenft.kernels.checks import check_attention, compute_dtype, exact
from qwenft.kernels.layout import SequenceLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    # From the positions of queries and keys in their documents, which broadcast, to a bool for each pair.
    Rule = Callable[[Tensor, Tensor], Tensor]

# Tokens on a side of a block of the mask; the blocks of torch's kernels divide it.
BLOCK = 128

# Blocks whose pairs are evaluated at a time: 8 million pairs, whatever the length of the stream.
BLOCKS_AT_A_TIME = 512

# On a CPU, documents that begin in the same window of so many tokens share a call, which costs 15 ms of itself.
WINDOW = 512

# Variants of the compiled kernel a process may hold: of one token, of one block and of more, with gradients and
# without, for each rule. Torch's 8 are for functions that are not meant to vary.
VARIANTS = 64


def not_later(query_position: Tensor, key_position: Tensor) -> Tensor:
    """The causal rule: no token sees a later one."""
    return key_position <= query_position


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: SequenceLayout,
    scale: float,
    causal: bool = True,
    rule: Rule = not_later,
) -> Tensor:
    """Attend by ``rule`` within each document; a token that sees nothing gets zeros.

    Args:
        query: [S, H, D], the last tokens of each document.
        key: [T, G, D]; query head h reads key head h // (H / G).
        value: [T, G, D].
        layout: where the documents begin; it keeps the block masks, one for each ``rule`` that is a new object.
        scale: the factor on query times key.
        causal: ask ``rule``; where False, all tokens of a document see each other.
        rule: from positions in the document to whether the query sees the key, elementwise in torch; it is given
            integers of any shapes that broadcast.

    Returns:
        [S, H, D], in the dtype of ``query``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    check_attention(query, key, value, layout)
    asked_rule = rule if causal else None
    if query.device.type != "cpu":
        return _fused(query, key, value, block_mask(layout, asked_rule), scale)
    outputs = [
        _OnCpu.apply(run.mask, scale, query[run.asked], key[run.seen], value[run.seen])
        for run in _runs(layout, asked_rule)
    ]
    return torch.cat(outputs)


def block_mask(layout: SequenceLayout, rule: Rule | None) -> BlockMask:
    """Which pairs of the stream see each other, and which blocks of pairs do in part or as a whole.

    Args:
        layout: where the documents begin; it keeps the mask.
        rule: of who sees whom within a document, or None where all do.

    Returns:
        A mask of S queries and T keys. Its tensors have a number for each pair of blocks, and nothing on the way
        to them is larger than 8 million numbers or one for each pair of blocks.
    """
    return layout.derived(("block mask", rule), lambda: _block_mask(layout, rule))


def _block_mask(layout: SequenceLayout, rule: Rule | None) -> BlockMask:
    sees = _pair_rule(layout, rule)
    asked, total = sum(layout.query_lengths), layout.total
    pairs_P2 = _blocks_that_share(layout).nonzero().to(layout.device)
    some, every = [], []
    for blocks_P2 in pairs_P2.split(BLOCKS_AT_A_TIME):
        inside = torch.arange(BLOCK, device=layout.device)
        query_PB1 = (blocks_P2[:, 0, None] * BLOCK + inside)[:, :, None]
        key_P1B = (blocks_P2[:, 1, None] * BLOCK + inside)[:, None, :]
        visible = sees(None, None, query_PB1.clamp(max=asked - 1), key_P1B.clamp(max=total - 1))
        visible = visible & (query_PB1 < asked) & (key_P1B < total)
        some.append(visible.any(-1).any(-1))
        every.append(visible.all(-1).all(-1))
    shape = (-(-asked // BLOCK), -(-total // BLOCK))
    in_part, whole = torch.zeros(2, *shape, dtype=torch.bool, device=layout.device)
    rows, columns = pairs_P2.unbind(1)
    in_part[rows, columns] = torch.cat(some) & ~torch.cat(every)
    whole[rows, columns] = torch.cat(every)
    return BlockMask.from_kv_blocks(
        *_listed(in_part), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(asked, total)
    )


def _pair_rule(layout: SequenceLayout, rule: Rule | None) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
    """The rule in the form of a ``mask_mod``: from indexes of queries and keys in the stream."""
    key_document, key_position = layout.document_ids.int(), layout.position_ids.int()
    ends = zip(layout.starts[1:], layout.query_lengths, strict=True)
    asking = torch.cat([torch.arange(end - asked, end) for end, asked in ends]).to(layout.device)
    query_document, query_position = key_document[asking], key_position[asking]

    def sees(_batch: Any, _head: Any, query: Tensor, key: Tensor) -> Tensor:
        together = query_document[query] == key_document[key]
        return together if rule is None else together & rule(query_position[query], key_position[key])

    return sees


def _blocks_that_share(layout: SequenceLayout) -> Tensor:
    """[S / 128, T / 128] bool, rounded up, on the host: which blocks of queries and of keys share a document."""
    first_query, last_query = _documents_of_blocks(layout.query_lengths)
    first_key, last_key = _documents_of_blocks(layout.lengths)
    return (first_query[:, None] <= last_key) & (first_key <= last_query[:, None])


def _documents_of_blocks(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The first and the last document in each block of a stream of documents of these lengths."""
    ends = torch.tensor(lengths).cumsum(0)
    first_tokens = torch.arange(0, sum(lengths), BLOCK)
    last_tokens = (first_tokens + BLOCK - 1).clamp(max=sum(lengths) - 1)
    return torch.searchsorted(ends, first_tokens, right=True), torch.searchsorted(ends, last_tokens, right=True)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A table of blocks as torch lists it: how many are set in each row, and their columns before the others."""
    columns = blocks.byte().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], columns.int()[None, None]


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Attend by torch's compiled kernel; [S, H, D]."""
    with exact(query):
        output_1HSD = _compiled()(
            _heads_first(query),
            _heads_first(key),
            _heads_first(value),
            block_mask=mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            kernel_options=_kernel_options(query),
        )
    return output_1HSD[0].transpose(0, 1)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """Torch's kernel for all lengths; one graph or an error, for uncompiled it would materialise all scores."""
    compile_: Any = torch.compile  # whose stubs do not know recompile_limit
    return compile_(torch_flex_attention, dynamic=True, fullgraph=True, recompile_limit=VARIANTS)


def _kernel_options(query: Tensor) -> dict[str, Any]:
    """What torch's kernel must be told for queries [S, H, D]."""
    # Queries below 128 would get a kernel of their own, with other rounding and another compilation.
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if query.shape[2] > 128 and query.dtype.itemsize == 2:
        gpu: Any = torch.cuda.get_device_properties(query.device)
        shared_memory = gpu.shared_memory_per_block_optin
        # Torch's blocks for the backward pass take so much, and consumer cards have 101376 bytes: these are the
        # fastest that fit (https://github.com/pytorch/pytorch/issues/198224).
        if shared_memory < 114688:
            blocks = dict.fromkeys(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), 32)
            options |= blocks | {"bwd_num_stages": 2, "bwd_num_warps": 4}
    return options


def _heads_first(x_THD: Tensor) -> Tensor:
    return x_THD.transpose(0, 1)[None]


class _Run(NamedTuple):
    """Neighbouring documents that go through one call: where their queries and keys lie, and who sees whom."""

    asked: slice
    seen: slice
    mask: BlockMask


def _runs(layout: SequenceLayout, rule: Rule | None) -> list[_Run]:
    """The stream in runs of whole documents, so that its cost grows with theirs squared and not with its own."""
    return layout.derived(("runs of documents", rule), lambda: _make_runs(layout, rule))


def _make_runs(layout: SequenceLayout, rule: Rule | None) -> list[_Run]:
    asked_starts = [0, *accumulate(layout.query_lengths)]
    runs = []
    for _, group in groupby(range(len(layout)), key=lambda number: layout.starts[number] // WINDOW):
        numbers = list(group)
        first, end = numbers[0], numbers[-1] + 1
        part = SequenceLayout(layout.lengths[first:end], query_lengths=layout.query_lengths[first:end])
        asked = slice(asked_starts[first], asked_starts[end])
        runs.append(_Run(asked, slice(layout.starts[first], layout.starts[end]), block_mask(part, rule)))
    return runs


class _OnCpu(torch.autograd.Function):
    """A run of documents on a CPU: forward by torch, backward by all pairs; in float32 whatever the dtype."""

    @staticmethod
    def forward(ctx: Any, mask: BlockMask, scale: float, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.mask, ctx.scale = mask, scale
        dtype = compute_dtype(inputs[0])
        with exact(inputs[0]), warnings.catch_warnings():
            # Uncompiled is meant: torch's C++ for CPUs does not compile for all lengths at once, and takes 10 s
            # for each of them.
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
            query, key, value = (_heads_first(x.detach().to(dtype)) for x in inputs)
            output_1HSD: Any = torch_flex_attention(
                query, key, value, block_mask=mask, scale=scale, enable_gqa=True
            )
        return output_1HSD[0].transpose(0, 1).to(inputs[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        (asked, heads, _), (seen, groups, _), dtype = query.shape, key.shape, compute_dtype(query)
        hidden_ST = ~create_mask(ctx.mask.mask_mod, 1, 1, asked, seen, device="cpu")[0, 0]
        # The query heads of a group stand below each other: R = H / G * S rows for each of its keys.
        hidden_RT = hidden_ST.repeat(heads // groups, 1)
        query_GRD = _grouped(query.to(dtype), groups) * ctx.scale
        grad_output_GRD = _grouped(grad_output.to(dtype), groups)
        key_GTD, value_GTD = (x.to(dtype).transpose(0, 1) for x in (key, value))
        with exact(query):
            weights_GRT = (query_GRD @ key_GTD.mT).masked_fill_(hidden_RT, float("-inf")).softmax(-1)
            # A row that sees nothing has NaN for its softmax, and zeros for its output.
            weights_GRT.masked_fill_(hidden_RT, 0.0)
            grad_weights_GRT = grad_output_GRD @ value_GTD.mT
            mean_GR1 = (weights_GRT * grad_weights_GRT).sum(-1, keepdim=True)
            grad_scores_GRT = grad_weights_GRT.sub_(mean_GR1).mul_(weights_GRT)
            grad_query_GRD = grad_scores_GRT @ key_GTD * ctx.scale
            grad_key_GTD = grad_scores_GRT.mT @ query_GRD
            grad_value_GTD = weights_GRT.mT @ grad_output_GRD
        grad_query = grad_query_GRD.view(heads, asked, -1).transpose(0, 1)
        grads = grad_query, grad_key_GTD.transpose(0, 1), grad_value_GTD.transpose(0, 1)
        return None, None, *(grad.to(query.dtype) for grad in grads)


def _grouped(x_SHD: Tensor, groups: int) -> Tensor:
    """[S, H, D] as [G, H / G * S, D]."""
    return x_SHD.transpose(0, 1).reshape(groups, -1, x_SHD.shape[2])
