"""What the kernels refuse: each message names the argument."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from qwenft.kernels.layout import SequenceLayout


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a kernel computes in: float32, or float64 for float64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


@contextmanager
def exact(x: Tensor) -> Iterator[None]:
    """No autocast on the device of ``x``: it would round the products of a recurrence to 16 bits."""
    with torch.autocast(x.device.type, enabled=False):
        yield


def check_tensor(name: str, x: Tensor, shape: Sequence[int], legend: str, layout: SequenceLayout) -> None:
    """Refuse a tensor of another shape, of no float dtype, or on another device than the layout.

    Args:
        name: of the argument.
        x: the argument.
        shape: what is expected.
        legend: the same in letters, such as "[T, K, D]".
        layout: where the documents begin.

    Raises:
        ValueError: ``x`` is refused.
    """
    if tuple(x.shape) != tuple(shape):
        msg = f"{name}: expected {legend} = {list(shape)}, got {list(x.shape)}"
        raise ValueError(msg)
    if not x.dtype.is_floating_point:
        msg = f"{name}: expected a float dtype, got {x.dtype}"
        raise ValueError(msg)
    if x.device.type != layout.device.type:
        msg = f"{name}: expected the layout's device {layout.device}, got {x.device}; see layout.to()"
        raise ValueError(msg)


def check_rank(name: str, x: Tensor, legend: str) -> None:
    """Refuse a tensor with another number of dimensions than the letters of ``legend``.

    Raises:
        ValueError: ``x`` is refused.
    """
    if x.ndim != legend.count(",") + 1:
        msg = f"{name}: expected {legend}, got {list(x.shape)}"
        raise ValueError(msg)


def check_groups(name: str, heads: int, divisor: str, groups: int) -> None:
    """Refuse a number of heads that its groups do not divide.

    Raises:
        ValueError: they do not.
    """
    if groups < 1 or heads % groups:
        msg = f"{name}: its {heads} heads are no multiple of the {groups} heads of {divisor}"
        raise ValueError(msg)


def check_single(layout: SequenceLayout, name: str) -> None:
    """Refuse a layout of several documents for the backend ``name``, which cannot keep them apart.

    Raises:
        ValueError: there are several.
    """
    if len(layout) > 1:
        msg = f"layout: {name} takes one document a row, got {len(layout)}"
        raise ValueError(msg)


def check_delta_rule(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], initial_state: Tensor | None, layout: SequenceLayout
) -> None:
    """Refuse what the gated delta rule cannot take.

    Args:
        inputs: query, key, value, log_decay and beta.
        initial_state: [N, V, D, E] or None.
        layout: where the documents begin.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    query, key, value, log_decay, beta = inputs
    check_rank("key", key, "[T, K, D]")
    check_rank("value", value, "[T, V, E]")
    (_, key_heads, key_dim), (_, value_heads, value_dim) = key.shape, value.shape
    check_tensor("query", query, (layout.total, key_heads, key_dim), "[T, K, D]", layout)
    check_tensor("key", key, (layout.total, key_heads, key_dim), "[T, K, D]", layout)
    check_tensor("value", value, (layout.total, value_heads, value_dim), "[T, V, E]", layout)
    check_tensor("log_decay", log_decay, (layout.total, value_heads), "[T, V]", layout)
    check_tensor("beta", beta, (layout.total, value_heads), "[T, V]", layout)
    check_groups("value", value_heads, "key", key_heads)
    if initial_state is not None:
        shape = (len(layout), value_heads, key_dim, value_dim)
        check_tensor("initial_state", initial_state, shape, "[N, V, D, E]", layout)


def check_conv(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    initial_state: Tensor | None,
    layout: SequenceLayout,
    *,
    activation: str | None,
) -> None:
    """Refuse what the short convolution cannot take.

    Args:
        inputs: x, weight and bias.
        initial_state: [N, W - 1, C] or None.
        layout: where the documents begin.
        activation: "silu" or None.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the activation is unknown.
    """
    x, weight, bias = inputs
    check_rank("weight", weight, "[C, W]")
    channels, width = weight.shape
    check_tensor("weight", weight, (channels, width), "[C, W]", layout)
    check_tensor("x", x, (layout.total, channels), "[T, C]", layout)
    if bias is not None:
        check_tensor("bias", bias, (channels,), "[C]", layout)
    if initial_state is not None:
        check_tensor("initial_state", initial_state, (len(layout), width - 1, channels), "[N, W - 1, C]", layout)
    if activation not in ("silu", None):
        msg = f'activation: expected "silu" or None, got {activation!r}'
        raise ValueError(msg)


def check_attention(query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout) -> None:
    """Refuse what attention cannot take.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    check_rank("query", query, "[S, H, D]")
    check_rank("key", key, "[T, G, D]")
    _, heads, head_dim = query.shape
    groups = key.shape[1]
    check_tensor("query", query, (sum(layout.query_lengths), heads, head_dim), "[S, H, D]", layout)
    check_tensor("key", key, (layout.total, groups, head_dim), "[T, G, D]", layout)
    check_tensor("value", value, (layout.total, groups, head_dim), "[T, G, D]", layout)
    check_groups("query", heads, "key", groups)
    if not query.dtype == key.dtype == value.dtype:
        msg = f"query: expected one dtype with key and value, got {query.dtype}, {key.dtype}, {value.dtype}"
        raise ValueError(msg)
