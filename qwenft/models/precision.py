"""Weights stored in one dtype and multiplied in another.

On a processor without bfloat16 instructions a bfloat16 product is many times slower than a float32 one, and a
weight that is upcast just before the product costs nothing measurable; on a GPU trained float32 weights meet
bfloat16 activations the same way. A cast weight is never kept for backward: it is cast again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

from qwenft.kernels.experts import LowRank, routed_experts
from qwenft.kernels.quantized import dense

if TYPE_CHECKING:
    from collections.abc import Sequence


class _CastMatmul(torch.autograd.Function):
    """x [..., I] times weight [O, I] transposed, with the weight cast to x's dtype here and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        trained = weight.requires_grad
        ctx.save_for_backward(*((x, weight) if trained else (None, None)))
        # Held by its module in any case; what is saved loses the scales of a quantized weight to hooks.
        ctx.frozen = None if trained else weight
        return x @ dense(weight, x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # type: ignore[override]  # as autograd calls it
        x, weight = ctx.saved_tensors
        weight = weight if ctx.frozen is None else ctx.frozen
        grad_x = grad @ dense(weight, grad.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            # In x's dtype: autograd casts it to what the weight's gradient is held in.
            grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
        return grad_x, grad_weight


class _CastLookup(torch.autograd.Function):
    """Rows of a weight [V, H], cast to ``dtype``; a token that occurs often has its gradients added there too."""

    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, weight: torch.Tensor, padding: int | None, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.words, ctx.padding = len(weight), -1 if padding is None else padding
        return F.embedding(ids, weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, None, None]:  # type: ignore[override]  # as autograd calls it
        (ids,) = ctx.saved_tensors
        grad_weight = torch.ops.aten.embedding_dense_backward(grad, ids, ctx.words, ctx.padding, False)
        return None, grad_weight, None, None


def cast_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T`` in x's dtype, whatever the weight is stored in.

    Args:
        x: [..., I].
        weight: [O, I]; quantized, it is packed and has the shape of that.

    Returns:
        [..., O].
    """
    return F.linear(x, weight) if weight.dtype == x.dtype else _CastMatmul.apply(x, weight)


class CastLinear(nn.Linear):
    """A Linear without bias whose weight is cast to its input's dtype."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name that torch gives it
        """[..., I] to [..., O]."""
        return cast_matmul(input, self.weight)


class CastEmbedding(nn.Embedding):
    """An embedding that hands its rows on in ``compute_dtype``, and so sets the dtype of the residual stream.

    Its weight may be on another device than the ids; the rows go to where the ids are.
    """

    compute_dtype: torch.dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name that torch gives it
        """[...] to [..., H]."""
        ids = input.to(self.weight.device)
        rows: torch.Tensor = _CastLookup.apply(ids, self.weight, self.padding_idx, self.compute_dtype)
        return rows.to(input.device)


class CastRouter(moe.Qwen3_5MoeTopKRouter):
    """The router with its weight cast to the hidden states' dtype."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, H] to router logits [T, X], weights [T, k] and indices [T, k] of the chosen experts."""
        logits = cast_matmul(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        weights, chosen = logits.softmax(dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        return logits, (weights / weights.sum(dim=-1, keepdim=True)).to(logits.dtype), chosen


class RoutedExperts(moe.Qwen3_5MoeExperts):
    """Routed experts over tokens sorted by expert; exact, in any storage dtype, quantized or not.

    Attributes:
        ends: behind the last slot of each expert, where that is known before the router says it.
    """

    ends: Sequence[int] | None = None

    def stack_shape(self, name: str) -> tuple[int, int, int]:
        """The shape of "gate_up_proj" or "down_proj", packed or not."""
        wide, thin = self.hidden_dim, self.intermediate_dim
        return (self.num_experts, *((2 * thin, wide) if name == "gate_up_proj" else (wide, thin)))

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        **adapters: LowRank,
    ) -> torch.Tensor:
        """Sum what each token's experts answer.

        Args:
            hidden_states: [T, H].
            top_k_index: [T, k], the experts of each token.
            top_k_weights: [T, k].
            adapters: beside the stacks, by their names.

        Returns:
            [T, H].
        """
        return routed_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.gate_up_proj,
            self.down_proj,
            gate_up_lora=adapters.get("gate_up_proj"),
            down_lora=adapters.get("down_proj"),
            ends=self.ends,
        )


def compute_in(model: Any, dtype: str) -> Any:
    """Make a model compute in ``dtype``, its weights staying in the dtype that each is stored in.

    Args:
        model: as loaded; modules are given subclasses of their own classes, in place.
        dtype: "bfloat16" or "float32".

    Returns:
        The model.
    """
    compute = getattr(torch, dtype)
    if getattr(model.model, "visual", None) is not None:
        model.model.visual.to(compute)
    for name, module in model.named_modules():
        if ".visual." in f".{name}.":
            continue
        if type(module) is nn.Linear and module.bias is None:
            module.__class__ = CastLinear
        elif type(module) is nn.Embedding:
            module.__class__ = CastEmbedding
            module.compute_dtype = compute
        elif type(module) is moe.Qwen3_5MoeTopKRouter:
            module.__class__ = CastRouter
        elif type(module) is moe.Qwen3_5MoeExperts:
            module.__class__ = RoutedExperts
    return model
