"""Softmax attention one document at a time: written out, and through torch's fused kernel."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from qwenft.kernels.checks import check_attention, compute_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from qwenft.kernels.layout import SequenceLayout


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, *, layout: SequenceLayout, scale: float, causal: bool = True
) -> Tensor:
    """Attend by a masked softmax over all pairs of a document, in float32 whatever the dtype.

    Args:
        query: [S, H, D], the last tokens of each document.
        key: [T, G, D]; query head h reads key head h // (H / G).
        value: [T, G, D].
        layout: where the documents begin.
        scale: the factor on query times key.
        causal: no token sees a later one.

    Returns:
        [S, H, D], in the dtype of ``query``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    check_attention(query, key, value, layout)
    dtype = compute_dtype(query)
    group = query.shape[1] // key.shape[1]
    outputs = []
    for asked, seen in _documents(layout):
        query_HSD = query[asked].to(dtype).transpose(0, 1)
        key_HLD = key[seen].to(dtype).transpose(0, 1).repeat_interleave(group, dim=0)
        value_HLD = value[seen].to(dtype).transpose(0, 1).repeat_interleave(group, dim=0)
        scores_HSL = query_HSD @ key_HLD.mT * scale
        if causal:
            visible = _visible(scores_HSL.shape[1], scores_HSL.shape[2], query.device)
            scores_HSL = scores_HSL.masked_fill(~visible, float("-inf"))
        outputs.append((scores_HSL.softmax(-1) @ value_HLD).transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, *, layout: SequenceLayout, scale: float, causal: bool = True
) -> Tensor:
    """Attend through torch.nn.functional.scaled_dot_product_attention, documents of one length in one call.

    Args:
        query: [S, H, D], the last tokens of each document.
        key: [T, G, D]; query head h reads key head h // (H / G).
        value: [T, G, D].
        layout: where the documents begin.
        scale: the factor on query times key.
        causal: no token sees a later one.

    Returns:
        [S, H, D], in the dtype of ``query``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    check_attention(query, key, value, layout)
    documents = list(_documents(layout))
    alike: dict[tuple[int, int], list[int]] = {}
    for number, lengths in enumerate(zip(layout.query_lengths, layout.lengths, strict=True)):
        alike.setdefault(lengths, []).append(number)
    outputs: list[Tensor] = [query] * len(documents)
    for (asked, length), numbers in alike.items():
        output_NHSD = functional.scaled_dot_product_attention(
            _stacked(query, [documents[number][0] for number in numbers]),
            _stacked(key, [documents[number][1] for number in numbers]),
            _stacked(value, [documents[number][1] for number in numbers]),
            # is_causal aligns the first query with the first key: right only where every token asks.
            attn_mask=_visible(asked, length, query.device) if causal and 1 < asked < length else None,
            is_causal=causal and 1 < asked == length,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for number, output_HSD in zip(numbers, output_NHSD.unbind(), strict=True):
            outputs[number] = output_HSD.transpose(0, 1)
    return torch.cat(outputs)


def _documents(layout: SequenceLayout) -> zip[tuple[slice, slice]]:
    """Where each document's queries and keys lie."""
    asked = [0, *accumulate(layout.query_lengths)]
    return zip(map(slice, asked, asked[1:]), map(slice, layout.starts, layout.starts[1:]), strict=False)


def _visible(asked: int, length: int, device: torch.device) -> Tensor:
    """[S, L] bool: which keys each of a document's last S tokens may see."""
    return torch.ones(asked, length, dtype=torch.bool, device=device).tril(length - asked)


def _stacked(x: Tensor, slices: list[slice]) -> Tensor:
    """The named rows of [T, heads, D] as [N, heads, L, D], without a copy where they are the whole stream."""
    length = slices[0].stop - slices[0].start
    if len(slices) * length == len(x):
        return x.view(len(slices), length, *x.shape[1:]).transpose(1, 2)
    return torch.stack([x[rows] for rows in slices]).transpose(1, 2)
