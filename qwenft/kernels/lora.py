"""A frozen matrix product with a low-rank one beside it (LoRA, arXiv:2106.09685), as one node of the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwenft.kernels.quantized import dense


def lora_product(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``x @ weight.T + scaling * (x @ a.T) @ b.T``, in x's dtype, whatever the others are stored in.

    The low-rank part is added inside the products, so that nothing as large as the output is made for it, and
    backward keeps x, and the few columns of ``scaling * x @ a.T``. The weight gets no gradient.

    Args:
        x: [..., I].
        weight: [O, I], frozen; quantized, it is packed and has the shape of that.
        a: [r, I].
        b: [O, r].
        scaling: of the low-rank part.

    Returns:
        [..., O].
    """
    return _LoraProduct.apply(x, weight, a, b, scaling)


def _scaled_product(x: Tensor, y: Tensor, scaling: float) -> Tensor:
    """``scaling * (x @ y)`` as one kernel."""
    return x.new_empty(len(x), y.shape[1]).addmm_(x, y, beta=0, alpha=scaling)


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd knows positional arguments alone
        ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        reduced = _scaled_product(rows, a.to(x.dtype).T, scaling)
        ctx.save_for_backward(x, reduced, a, b)
        # Held by its module in any case; what is saved loses the scales of a quantized weight to hooks.
        ctx.weight, ctx.scaling = weight, scaling
        y = rows @ dense(weight, x.dtype).T
        y.addmm_(reduced, b.to(x.dtype).T)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # as autograd calls it
        x, reduced, a, b = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_reduced = _scaled_product(grad, b.to(grad.dtype), ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dense(ctx.weight, grad.dtype)
            grad_x = grad_x.addmm_(grad_reduced, a.to(grad.dtype)).view_as(x)
        grad_a = grad_reduced.T @ rows if ctx.needs_input_grad[2] else None
        grad_b = grad.T @ reduced if ctx.needs_input_grad[3] else None
        return grad_x, None, grad_a, grad_b, None
