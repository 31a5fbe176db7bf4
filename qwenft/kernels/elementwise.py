"""What stands between the matrix products: norms and gates that keep no more for backward than their inputs.

Written as compositions of torch, each of these keeps its intermediate results and walks over memory many times in
backward. Here the results are computed in place, and again in backward from what the layers hold anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenft.kernels.checks import compute_dtype
from qwenft.kernels.fusion import fusible


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, gate: Tensor | None = None) -> Tensor:
    """Root mean square norm (arXiv:1910.07467), with a SiLU gate behind it where one is given.

    The same as the following, computed in float32::

        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
        y if gate is None else y * silu(gate)

    Args:
        x: [..., H].
        weight: [H]; of a zero-centred norm, its weight plus one.
        eps: added to the mean square.
        gate: [..., H].

    Returns:
        [..., H], in the dtype of ``x``.
    """
    return _RMSNorm.apply(x, weight, gate, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (arXiv:2002.05202).

    Args:
        gate: [..., F].
        up: [..., F].

    Returns:
        [..., F].
    """
    return _SwiGLU.apply(gate, up)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor:
        y, scale = _norm(x, weight, gate, eps)
        ctx.save_for_backward(x, weight, gate, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # as autograd calls it
        x, weight, gate, scale = ctx.saved_tensors
        return *_norm_gradients(grad, x, weight, gate, scale, ctx.needs_input_grad[:3]), None


@fusible
def _norm(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(compute_dtype(x))
    # In the order of transformers, so that the result is its own to the bit.
    scale = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    y = (wide * scale).mul_(weight)
    if gate is not None:
        y.mul_(F.silu(gate.to(y.dtype)))
    return y.to(x.dtype), scale


@fusible
def _norm_gradients(  # noqa: PLR0917 - as saved
    grad: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, scale: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """With r = rsqrt(mean(x^2) + eps), a = d loss / d(x r): d loss / dx = r a - x r^3 mean(a x)."""
    wide, grad = x.to(scale.dtype), grad.to(scale.dtype)
    grad_x = grad_weight = grad_gate = None
    if gate is not None:
        wide_gate = gate.to(scale.dtype)
        if wanted[2]:
            ungated = (wide * scale).mul_(weight).mul_(grad)
            grad_gate = torch.ops.aten.silu_backward(ungated, wide_gate).to(gate.dtype)
        grad = F.silu(wide_gate).mul_(grad)
    if wanted[1]:
        grad_weight = (wide * scale).mul_(grad).flatten(0, -2).sum(dim=0)
    if wanted[0]:
        inner = grad * weight
        mean = (inner * wide).mean(dim=-1, keepdim=True)
        grad_x = inner.mul_(scale).addcmul_(wide, mean.mul_(scale.pow(3)), value=-1).to(x.dtype)
    return grad_x, grad_weight, grad_gate


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # as autograd calls it
        gate, up = ctx.saved_tensors
        return _gated_gradients(grad, gate, up, ctx.needs_input_grad)


@fusible
def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


@fusible
def _gated_gradients(
    grad: Tensor, gate: Tensor, up: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate) if wanted[0] else None
    grad_up = F.silu(gate).mul_(grad) if wanted[1] else None
    return grad_gate, grad_up
