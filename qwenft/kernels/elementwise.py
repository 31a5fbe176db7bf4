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
    """With r = rsqrt(mean(x^2) + eps), a = d loss / d(x r): d loss / dx = r a - x r^3 mean(a x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor:
        wide = x.to(compute_dtype(x))
        # In the order of transformers, so that the result is its own to the bit.
        scale = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, gate, scale)
        y = (wide * scale).mul_(weight)
        if gate is not None:
            y.mul_(F.silu(gate.to(y.dtype)))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, gate, scale = ctx.saved_tensors
        wide, grad = x.to(scale.dtype), grad.to(scale.dtype)
        grad_gate = grad_weight = None
        if gate is not None:
            if ctx.needs_input_grad[2]:
                ungated = (wide * scale).mul_(weight).mul_(grad)
                grad_gate = torch.ops.aten.silu_backward(ungated, gate.to(scale.dtype)).to(gate.dtype)
            grad = F.silu(gate.to(scale.dtype)).mul_(grad)
        if ctx.needs_input_grad[1]:
            grad_weight = (wide * scale).mul_(grad).flatten(0, -2).sum(dim=0)
        grad_x = None
        if ctx.needs_input_grad[0]:
            inner = grad * weight
            mean = (inner * wide).mean(dim=-1, keepdim=True)
            grad_x = inner.mul_(scale).addcmul_(wide, mean.mul_(scale.pow(3)), value=-1).to(x.dtype)
        return grad_x, grad_weight, grad_gate, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate) if ctx.needs_input_grad[0] else None
        grad_up = F.silu(gate).mul_(grad) if ctx.needs_input_grad[1] else None
        return grad_gate, grad_up
