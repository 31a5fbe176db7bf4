"""What the operations of a step compute and move, of which an estimate of its time is made."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qwenft.machine import Machine

aten = torch.ops.aten
#: Bytes a second between a device and its host, over PCIe 4.
_TO_HOST = 25e9
#: What only makes room.
_EMPTY = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)


@attrs.frozen
class Work:
    """Of an operation.

    Args:
        dtype: of its arguments.
        operations: floating-point operations of matrix products.
        moved: bytes of what it reads and writes.
        sent: bytes that it sends to other processes, or waits for.
        copied: bytes from the device to the host, or back.
    """

    dtype: str
    operations: float = 0.0
    moved: float = 0.0
    sent: float = 0.0
    copied: float = 0.0


def seconds_of(work: Iterable[Work], machine: Machine) -> float:
    """The time of operations one after the other, each as long as its products or its memory take (a roofline).

    Other processes are heard while it is computed: what takes longer counts. Not a number where nothing is known
    of the machine's rates.
    """
    if not machine.bandwidth:
        return math.nan
    rates = dict(machine.operations)
    computed = sent = 0.0
    for each in work:
        rate = rates.get(each.dtype, rates["float32"])
        computed += max(each.operations / rate, each.moved / machine.bandwidth, each.copied / _TO_HOST)
        sent += each.sent / machine.link
    return max(computed, sent)


def work_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Work | None:
    """What a call of an operation takes, or None where that is nothing: a view, or room for what comes."""
    packet = func.overloadpacket
    if func.is_view or packet in _EMPTY:
        return None
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    if not given or not made:
        return None
    dtype = str(given[0].dtype).removeprefix("torch.")
    if func.namespace == "c10d":
        return Work(dtype, sent=max(tensor.nbytes for tensor in (*given, *made)))
    count = _PRODUCTS.get(packet)
    operations = 0.0 if count is None else float(count(*args, **kwargs, out_val=result))
    return Work(dtype, operations, sum(tensor.nbytes for tensor in (*given, *made)))


def _attention(query: Any, key: Any, *others: Any, is_causal: bool = False, **_: Any) -> float:
    """Of [B, H, S, D] queries: their products with keys, and of the weights with values."""
    causal = others[2] if len(others) > 2 else is_causal  # after the value and dropout
    return 4.0 * query.numel() * key.shape[-2] * (0.5 if causal else 1.0)


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *others: Any, **__: Any) -> float:
    """The weights once more, and four products with them or their gradients."""
    return 2.5 * _attention(query, key, value, *others[2:])  # after the output and the sums


def _grouped(left: Any, right: Any, *_: Any, **__: Any) -> float:
    """Of rows [S, K] with [G, K, N], each with one of the G; or [M, S] with [S, N], of G groups of columns."""
    return 2.0 * left.numel() * right.shape[-1]


_PRODUCTS: dict[Any, Callable[..., float]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # noqa: SLF001
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,  # noqa: SLF001
    aten._grouped_mm: _grouped,  # noqa: SLF001
}
