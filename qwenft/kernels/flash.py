"""Softmax attention through flash-attention (arXiv:2205.14135): Dao-AILab's packages, and builds from the hub.

The packages are imported when a function here runs. What they share is taken by keyword, for the order differs:
4 has `qv` where 2 and 3 have `cu_seqlens_q`. Where fewer tokens ask than a document has, their causal mask is
aligned to the bottom right, as the contract wants it (flash_attn_interface.py, since 2.1; cute/mask.py).
"""

from __future__ import annotations

import functools
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from qwenft.kernels.checks import check_attention

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from torch import Tensor

    from qwenft.kernels.layout import SequenceLayout


def packaged_function(version: int) -> Callable[..., Any]:
    """The `flash_attn_varlen_func` of an installed package.

    Args:
        version: 2 (flash-attn), 3 (flash_attn_3) or 4 (flash-attn-4).

    Raises:
        ImportError: it is not installed, or does not load.
    """
    if version == 2:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,import-untyped]
    elif version == 3:
        from flash_attn_interface import (  # type: ignore[import-not-found,import-untyped]
            flash_attn_varlen_func,
        )
    else:
        from flash_attn.cute import (  # type: ignore[import-not-found,import-untyped]
            flash_attn_varlen_func,
        )
    return flash_attn_varlen_func


@functools.cache
def hub_kernel(name: str, revision: str, *, trusted: bool) -> ModuleType:
    """The module of a kernel on the Hugging Face hub, fetched once a process and kept in the hub's cache.

    Args:
        name: the repository, "org/name".
        revision: its commit.
        trusted: load it also where the hub does not count its publisher among the trusted ones.

    Raises:
        ImportError: the package `kernels` is not installed, or the kernel does not load.
        ValueError: the publisher is not trusted.
        OSError: the hub cannot be reached, or has no build for this system.
        RuntimeError: the build is for other GPUs, or for a newer `kernels`.
    """
    from kernels import get_kernel  # type: ignore[import-not-found,import-untyped]

    return get_kernel(name, revision=revision, trust_remote_code=[name] if trusted else False)


def varlen_attention(
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: SequenceLayout,
    scale: float,
    causal: bool = True,
    repeats: bool = True,
) -> Tensor:
    """Attend by one call of a `flash_attn_varlen_func`, which is told where documents begin.

    Args:
        function: of any version of flash-attention.
        query: [S, H, D], the last tokens of each document, in 16 bits.
        key: [T, G, D]; query head h reads key head h // (H / G).
        value: [T, G, D].
        layout: where the documents begin.
        scale: the factor on query times key.
        causal: no token sees a later one.
        repeats: the function takes ``deterministic``, and is told of it where torch is asked for such algorithms.

    Returns:
        [S, H, D], in the dtype of ``query``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    check_attention(query, key, value, layout)
    return _output(
        function(
            query,
            key,
            value,
            cu_seqlens_q=layout.derived("query_cu_seqlens", lambda: _query_cu_seqlens(layout)),
            cu_seqlens_k=layout.cu_seqlens,
            max_seqlen_q=max(layout.query_lengths),
            max_seqlen_k=layout.max_length,
            softmax_scale=scale,
            causal=causal,
            **_determinism(repeats=repeats),
        )
    )


def document_attention(
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: SequenceLayout,
    scale: float,
    causal: bool = True,
    repeats: bool = True,
) -> Tensor:
    """Attend by a call of a `flash_attn_func` for each document: it knows batches, and no boundaries in a row.

    The arguments, the result and what is raised are those of :func:`varlen_attention`.
    """
    check_attention(query, key, value, layout)
    asked, lengths, options = list(layout.query_lengths), list(layout.lengths), _determinism(repeats=repeats)
    documents = zip(query.split(asked), key.split(lengths), value.split(lengths), strict=True)
    outputs = [
        _output(function(*(x[None] for x in document), softmax_scale=scale, causal=causal, **options))[0]
        for document in documents
    ]
    return torch.cat(outputs)


def _determinism(*, repeats: bool) -> dict[str, bool]:
    """The argument by which all versions add up a backward in a fixed order, where torch is asked to do so."""
    return {"deterministic": True} if repeats and torch.are_deterministic_algorithms_enabled() else {}


def _query_cu_seqlens(layout: SequenceLayout) -> Tensor:
    """[N + 1] int32: where the queries of each document begin."""
    if layout.query_lengths == layout.lengths:
        return layout.cu_seqlens
    return torch.tensor([0, *accumulate(layout.query_lengths)], dtype=torch.int32, device=layout.device)


def _output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output alone.

    2 returns it alone, and so does 3 since July 2025; 3 before that, the vLLM fork of 3, and 4 return it with the
    log of the softmax's sum.
    """
    return result[0] if isinstance(result, tuple) else result
