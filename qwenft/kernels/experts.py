"""Routed experts: tokens sorted by expert, and the products of one expert, or of a few, at a time.

Nothing is made of experts that no token is sent to, and of quantized ones no more is dense at a time than is being
multiplied. Backward makes them dense again, and keeps of a step the inputs and what the first product gave.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from qwenft.kernels.device import device_type
from qwenft.kernels.quantized import dense_experts, dense_shape, is_quantized

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Elements of quantized experts that are dense at a time on a GPU: 128 MiB in 16 bits.
_DENSE_AT_ONCE = 2**26
_ALIGNED = 8  # grouped products on a GPU want rows of 16 bytes


@attrs.frozen(eq=False)
class LowRank:
    """LoRA beside a stack of experts (arXiv:2106.09685), one pair an expert.

    Args:
        a: [E, r, I].
        b: [E, O, r].
        scaling: of ``b @ a``.
    """

    a: Tensor
    b: Tensor
    scaling: float


@attrs.frozen
class _Group:
    """Experts whose products are made together, and the slots, tokens sorted by expert, that they answer."""

    first: int
    last: int
    slots: slice


@attrs.frozen(eq=False)
class _Routes:
    """Which expert answers which token.

    Args:
        tokens: [S] the token of each slot, sorted by expert; S is tokens times experts of a token.
        order: [S] the place of each slot in the flattened choice.
        slots: [T, k] the slot of each choice.
        ends: [E] int32, behind the last slot of each expert.
        groups: that have a slot.
    """

    tokens: Tensor
    order: Tensor
    slots: Tensor
    ends: Tensor
    groups: tuple[_Group, ...]

    @property
    def idle(self) -> Tensor:
        """[E] bool: the experts without a slot."""
        return torch.diff(self.ends, prepend=self.ends.new_zeros(1)) == 0


def routed_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_lora: LowRank | None = None,
    down_lora: LowRank | None = None,
    together: int | None = None,
    ends: Sequence[int] | None = None,
) -> Tensor:
    """The weighted sum of what its experts, SwiGLU MLPs, answer to each token, in x's dtype.

    Args:
        x: [T, H].
        chosen: [T, k] int64, the experts of each token.
        weights: [T, k], of their answers.
        gate_up: [E, 2F, H], plain or as bitsandbytes quantizes it; it gets a gradient where it is trained.
        down: [E, H, F], likewise.
        gate_up_lora: beside ``gate_up``.
        down_lora: beside ``down``.
        together: experts whose products are made together, by torch's grouped product where it is more than one;
            by the device where None.
        ends: [E], behind the last slot of each expert, where the host knows them; asked of the device where None.

    Returns:
        [T, H].
    """
    if together is None:
        together = together_on(x, gate_up)
    routes = _routes(chosen, dense_shape(gate_up)[0], together, ends)
    pairs = [(pair.a, pair.b) if pair else (None, None) for pair in (gate_up_lora, down_lora)]
    scalings = tuple(pair.scaling if pair else 0.0 for pair in (gate_up_lora, down_lora))
    return _RoutedExperts.apply(x, weights, gate_up, down, *pairs[0], *pairs[1], scalings, routes)


def together_on(x: Tensor, stack: Tensor) -> int:
    """How many experts of a stack have their products made together, for inputs like ``x``."""
    experts, rows, columns = dense_shape(stack)
    if device_type(x) == "cpu":
        return 1
    return max(1, _DENSE_AT_ONCE // (rows * columns)) if is_quantized(stack) else experts


def slot_ends(in_order: Tensor, experts: int) -> Tensor:
    """[E] int64, behind the last slot of each expert, of sorted choices [S]; the host does not wait for them."""
    return torch.searchsorted(in_order, torch.arange(experts, device=in_order.device), right=True)


def _routes(chosen: Tensor, experts: int, together: int, known_ends: Sequence[int] | None) -> _Routes:
    in_order, order = chosen.flatten().sort(stable=True)
    ends = slot_ends(in_order, experts)
    firsts = range(0, experts, together)
    if known_ends is not None:
        bounds = [0, *known_ends]
    elif together < experts:
        bounds = [0, *ends.tolist()]
    else:  # the host need not wait for how many each answers
        bounds = [0] * experts + [len(order)]
    groups = [
        _Group(first, last, slice(bounds[first], bounds[last]))
        for first, last in ((first, min(first + together, experts)) for first in firsts)
        if bounds[first] < bounds[last]
    ]
    slots = torch.empty_like(order)
    slots[order] = torch.arange(len(order), device=order.device)
    return _Routes(order // chosen.shape[1], order, slots.view_as(chosen), ends.int(), tuple(groups))


def _summed(of_slots: Tensor, routes: _Routes, weights: Tensor | None = None) -> Tensor:
    """[S, H] to the (weighted) sums [T, H] of what belongs to each token, in the order of its choice."""
    return F.embedding_bag(routes.slots, of_slots, mode="sum", per_sample_weights=weights)


@attrs.frozen(eq=False)
class _Stack:
    """A stack of experts with what is beside it; or the gradients of all that, where they are asked for."""

    weight: Any
    a: Tensor | None
    b: Tensor | None
    scaling: float = 0.0

    @property
    def are_asked(self) -> bool:
        """Whether there is a gradient among them."""
        return any(part is not None for part in (self.weight, self.a, self.b))

    def gradients(self, dtype: torch.dtype, routes: _Routes) -> _Stack:
        """Room for those of what is trained, zero for experts without a slot."""
        weight, a, b = (_room(part, dtype, routes) for part in (self.weight, self.a, self.b))
        return _Stack(weight, a, b)


def _room(like: Tensor | None, dtype: torch.dtype, routes: _Routes) -> Tensor | None:
    if like is None or not like.requires_grad:
        return None
    return torch.empty_like(like, dtype=dtype).masked_fill_(routes.idle[:, None, None], 0)


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd knows positional arguments alone
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        a1: Tensor | None,
        b1: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
        scalings: tuple[float, float],
        routes: _Routes,
    ) -> Tensor:
        first, second = _Stack(gate_up, a1, b1, scalings[0]), _Stack(down, a2, b2, scalings[1])
        hidden_SF2 = x.new_empty(len(routes.order), dense_shape(gate_up)[1])
        answers_SH = x.new_empty(len(routes.order), x.shape[1])
        for group, product in _products(routes):
            hidden_NF2 = hidden_SF2[group.slots]
            product.forward(x.index_select(0, routes.tokens[group.slots]), first, out=hidden_NF2)
            gate, up = hidden_NF2.chunk(2, dim=-1)
            product.forward(F.silu(gate).mul_(up), second, out=answers_SH[group.slots])
        # A frozen stack is held by its module in any case; saved, a quantized one loses its scales to hooks.
        trained = [stack if stack.requires_grad else None for stack in (gate_up, down)]
        learns = any(part is not None and part.requires_grad for part in (gate_up, a1, b1))
        kept = x if learns else None
        ctx.save_for_backward(kept, weights, hidden_SF2, a1, b1, a2, b2, *trained)
        ctx.frozen = [None if stack.requires_grad else stack for stack in (gate_up, down)]
        ctx.scalings, ctx.routes = scalings, routes
        return _summed(answers_SH, routes, weights.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # as autograd calls it
        x, weights, hidden_SF2, a1, b1, a2, b2, *trained = ctx.saved_tensors
        gate_up, down = (kept if held is None else held for held, kept in zip(ctx.frozen, trained, strict=True))
        first, second = _Stack(gate_up, a1, b1, ctx.scalings[0]), _Stack(down, a2, b2, ctx.scalings[1])
        of_first, of_second = (stack.gradients(grad.dtype, ctx.routes) for stack in (first, second))
        routes = ctx.routes
        of_slot = weights.flatten()[routes.order].to(grad.dtype)
        grad_SH, grad_slots = grad.new_empty(len(routes.order), grad.shape[1]), torch.empty_like(of_slot)
        for group, product in _products(routes):
            tokens, weight_N1 = routes.tokens[group.slots], of_slot[group.slots, None]
            grad_NH = grad.index_select(0, tokens)
            gate, up = hidden_SF2[group.slots].chunk(2, dim=-1)
            opened = F.silu(gate)
            h_NF = opened * up
            grad_h = product.backward(grad_NH, second)
            grad_slots[group.slots] = (grad_h * h_NF).sum(-1)
            if of_second.are_asked:
                product.gradients(grad_NH, h_NF.mul_(weight_N1), second, of_second)
            grad_h.mul_(weight_N1)
            grad_gate = torch.ops.aten.silu_backward(grad_h * up, gate)
            grad_NF2 = torch.cat([grad_gate, grad_h.mul_(opened)], dim=-1)
            product.backward(grad_NF2, first, out=grad_SH[group.slots])
            if of_first.are_asked:
                product.gradients(grad_NF2, x.index_select(0, tokens), first, of_first)
        of_pairs = (of_first.a, of_first.b, of_second.a, of_second.b)
        grad_weights = grad_slots[routes.slots].to(weights.dtype)
        return _summed(grad_SH, routes), grad_weights, of_first.weight, of_second.weight, *of_pairs, None, None


def _products(routes: _Routes) -> Iterator[tuple[_Group, _Product]]:
    for group in routes.groups:
        ends = routes.ends[group.first : group.last] - group.slots.start
        yield group, _Product(group.first, group.last, ends)


@attrs.frozen(eq=False)
class _Product:
    """The products of a group of experts with their slots.

    Args:
        first: of its experts.
        last: the one behind them.
        ends: [last - first] int32, behind the last slot of each.
    """

    first: int
    last: int
    ends: Tensor

    def forward(self, x: Tensor, stack: _Stack, out: Tensor) -> None:
        """[N, I] to [N, O]."""
        weight = dense_experts(stack.weight, self.first, self.last, x.dtype)
        a, b = self._pair(stack, x.dtype)
        if len(weight) == 1:
            torch.mm(x, weight[0].T, out=out)
            if a is not None and b is not None:
                reduced = x.new_empty(len(x), a.shape[1]).addmm_(x, a[0].T, beta=0, alpha=stack.scaling)
                out.addmm_(reduced, b[0].T)
            return
        out.copy_(F.grouped_mm(x, weight.transpose(1, 2), offs=self.ends))
        if a is not None and b is not None:
            reduced = F.grouped_mm(x, a.transpose(1, 2), offs=self.ends).mul_(stack.scaling)
            out.add_(F.grouped_mm(reduced, b.transpose(1, 2), offs=self.ends))

    def backward(self, grad: Tensor, stack: _Stack, out: Tensor | None = None) -> Tensor:
        """The gradient of the output [N, O] to that of the input [N, I]."""
        weight = dense_experts(stack.weight, self.first, self.last, grad.dtype)
        a, b = self._pair(stack, grad.dtype)
        if len(weight) == 1:
            grad_x = torch.mm(grad, weight[0], out=out)
            if a is not None and b is not None:
                reduced = grad.new_empty(len(grad), a.shape[1]).addmm_(grad, b[0], beta=0, alpha=stack.scaling)
                grad_x.addmm_(reduced, a[0])
            return grad_x
        grad_x = F.grouped_mm(grad, weight, offs=self.ends)
        if a is not None and b is not None:
            reduced = F.grouped_mm(grad, b, offs=self.ends).mul_(stack.scaling)
            grad_x.add_(F.grouped_mm(reduced, a, offs=self.ends))
        return grad_x if out is None else out.copy_(grad_x)

    def gradients(self, grad: Tensor, x: Tensor, stack: _Stack, out: _Stack) -> None:
        """Put the gradients of a stack where they belong, of those of the output [N, O] and the inputs [N, I]."""
        if out.weight is not None:
            self._outer(grad, x, out.weight)
        a, b = self._pair(stack, x.dtype)
        if a is None or b is None:
            return
        if len(a) == 1:
            reduced, grad_reduced = x @ a[0].T, grad @ b[0]
        else:
            reduced = F.grouped_mm(x, a.transpose(1, 2), offs=self.ends)
            grad_reduced = F.grouped_mm(grad, b, offs=self.ends)
        if out.a is not None:
            self._outer(grad_reduced.mul_(stack.scaling), x, out.a)
        if out.b is not None:
            self._outer(grad, reduced.mul_(stack.scaling), out.b)

    def _outer(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """[N, P] and [N, Q] to [E, P, Q] over the slots of each expert, as much of it as ``out`` has room for."""
        out = out[self.first : self.last]
        if len(out) == 1:
            torch.mm(left.T, right, out=out[0])
            return
        found = F.grouped_mm(left.T, right, offs=self.ends)
        # What it gives for an expert without a slot is not defined.
        empty = torch.diff(self.ends, prepend=self.ends.new_zeros(1)) == 0
        out.copy_(found[:, : out.shape[1], : out.shape[2]].masked_fill(empty[:, None, None], 0))

    def _pair(self, stack: _Stack, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The low-rank pairs of the group; of several experts with zeros up to a rank that they are grouped by."""
        if stack.a is None or stack.b is None:
            return None, None
        a, b = (part[self.first : self.last].to(dtype) for part in (stack.a, stack.b))
        missing = 0 if len(a) == 1 else -a.shape[1] % _ALIGNED
        return F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
