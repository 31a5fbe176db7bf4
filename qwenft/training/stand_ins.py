"""What stands in a simulation for modules that ask tensors for values, and for kernels that cannot be followed."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qwenft.capabilities import AttentionBackend, LinearAttentionBackend, Workspace
from qwenft.kernels.experts import together_on
from qwenft.kernels.layout import SequenceLayout
from qwenft.models.bind import causal_of
from qwenft.models.precision import RoutedExperts
from qwenft.plan.rules.memory import declares
from qwenft.training.live_bytes import HOST
from qwenft.training.work import Work

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from qwenft.training.live_bytes import LiveBytes

T = TypeVar("T")
_CHUNK = 64  # tokens that the gated delta rule computes together


class HostLayout(SequenceLayout):
    """A layout of which everything that is derived has values: what is branched on is known."""

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns, of tensors with values."""
        with unset_fake_temporarily():
            return super().derived(key, make)


class AttentionStandIn(AttentionBackend):
    """Holds what a backend declares."""

    name, supports_packing, uses_flash_lib = "declared", True, False

    def __init__(self, held: Held) -> None:
        self.held = held

    def attend(self, query: Any, key: Any, value: Any, *, causal: bool = True, **_: Any) -> Any:
        """[S, H, D] of nothing."""
        pairs = sum(length**2 for length in self.held.lengths) * (0.5 if causal else 1.0)
        products = 4.0 * query.shape[1] * query.shape[2] * pairs
        return _Declared.apply(self.held, products, True, torch.empty_like(query), query, key, value)


class LinearStandIn(LinearAttentionBackend):
    """Likewise; its convolution keeps its input."""

    name, supports_packing, uses_flash_lib = "declared", True, False

    def __init__(self, held: Held) -> None:
        self.held = held

    def short_conv(self, x: Any, weight: Any, bias: Any, **_: Any) -> Any:
        """[T, C] of nothing."""
        given = [tensor for tensor in (x, weight, bias) if tensor is not None]
        nothing = attrs.evolve(self.held, saved={}, space=Workspace())
        return _Declared.apply(nothing, 0.0, True, torch.empty_like(x), *given)

    def delta_rule(self, query: Any, key: Any, value: Any, log_decay: Any, beta: Any, **_: Any) -> Any:
        """[T, V, E] of nothing."""
        output = torch.empty_like(value, memory_format=torch.contiguous_format)
        (_, _, key_dim), (tokens, heads, value_dim) = key.shape, value.shape
        # In chunks: with the state 3 products [C, D] [D, E], among tokens 3 [C, C] [C, D] and 2 [C, C] [C, E].
        each = 6 * key_dim * value_dim + 2 * _CHUNK * (3 * key_dim + 2 * value_dim)
        given = (query, key, value, log_decay, beta)
        return _Declared.apply(self.held, 1.0 * tokens * heads * each, False, output, *given)


@attrs.frozen
class Held:
    """What a backend holds for documents of some lengths, and where its work is counted.

    Args:
        saved: bytes that are kept for backward, by name.
        space: what kernels hold while they run.
        lengths: tokens of the documents.
        live: the record.
    """

    saved: Mapping[str, int]
    space: Workspace
    lengths: tuple[int, ...]
    live: LiveBytes

    @classmethod
    def of(cls, backend: Any, problem: Any, live: LiveBytes) -> Held:
        """What a backend declares; nothing where it declares nothing."""
        if not declares(backend):
            return cls({}, Workspace(), problem.lengths, live)
        return cls(backend.saved_tensors(problem), backend.workspace(problem), problem.lengths, live)


class _Declared(torch.autograd.Function):
    """Holds as many bytes as a computation is said to; backward's products are 2.5 times those of forward."""

    @staticmethod
    def forward(
        ctx: Any,
        held: Held,
        products: float,
        keeps_inputs: bool,
        output: torch.Tensor,
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        kept = [torch.empty(count, dtype=torch.uint8) for count in held.saved.values()]
        torch.empty(held.space.forward, dtype=torch.uint8)
        ctx.save_for_backward(*(inputs if keeps_inputs else ()), *kept)
        ctx.held, ctx.products = held, products
        ctx.like = [(tensor.shape, tensor.dtype) for tensor in inputs]
        ctx.moved = sum(tensor.nbytes for tensor in (output, *inputs, *kept))
        ctx.dtype = str(output.dtype).removeprefix("torch.")
        held.live.add_work(Work(ctx.dtype, products, ctx.moved))
        return output

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]  # as autograd calls it
        kept = ctx.saved_tensors
        workspace = torch.empty(ctx.held.space.backward, dtype=torch.uint8)
        ctx.held.live.add_work(Work(ctx.dtype, 2.5 * ctx.products, 2.5 * ctx.moved))
        asked = ctx.needs_input_grad[4:]
        grads = [
            torch.empty(shape, dtype=dtype) if wanted else None
            for (shape, dtype), wanted in zip(ctx.like, asked, strict=True)
        ]
        del kept, workspace
        return None, None, None, None, *grads


class _EvenlyRouted(RoutedExperts):
    """Experts that are chosen alike: as many as can be have work, and what is dense is as large as it gets."""

    live: LiveBytes

    def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any, **adapters: Any) -> Any:
        each = -(-top_k_index.numel() // self.num_experts)
        # What is made of experts is gone before the next ones: two groups of them will do, and work for all.
        busy = min(2 * together_on(hidden_states, self.gate_up_proj), self.num_experts)
        self.ends = [min(each * min(expert + 1, busy), top_k_index.numel()) for expert in range(self.num_experts)]
        alike = self.num_experts / busy
        self._count(1.0)
        given = Mark.apply(hidden_states, partial(self._count, 1.0))
        self._count(alike)
        answered = super().forward(given, top_k_index, top_k_weights, **adapters)
        self._count(1.0)
        return Mark.apply(answered, partial(self._count, alike))

    def _count(self, times: float) -> None:
        self.live.times = times


class Mark(torch.autograd.Function):
    """The same tensor; calls a function when its gradient comes by."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, function: Callable[[], None]) -> torch.Tensor:
        """``x``, and what to call."""
        ctx.function = function
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]  # as autograd calls it
        """The gradient, unchanged."""
        ctx.function()
        return grad, None


def _tower_of(bound: type) -> type:
    """The class of a tower that knows the grids of its images, as of all else, by their values."""

    class Tower(bound):  # type: ignore[misc,valid-type]
        def of_grids(self, *args: Any) -> dict[str, Any]:
            with unset_fake_temporarily():
                found: dict[str, Any] = super().of_grids(*args)
            return {**found, "image_layout": HostLayout.from_lengths(found["image_layout"].lengths)}

    return Tower


def keep_on_host(model: Any, live: LiveBytes) -> None:
    """Have checkpointed layers keep on the host what they were given, as transformers does on a device."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed = torch.empty_like(tensor)
        live.label(packed, HOST)
        live.add_work(Work("float32", copied=2.0 * tensor.nbytes))  # there and back
        return packed

    def offloaded(function: Any, *args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(pack, torch.empty_like):
            return checkpoint(function, *args, **kwargs, use_reentrant=False)

    for module in causal_of(model).modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = offloaded  # noqa: SLF001 - where transformers keeps its own


def know_values(model: Any, live: LiveBytes) -> None:
    """Tell modules what in a step they would ask tensors for, and count the work of experts that are left out."""
    for module in causal_of(model).modules():
        if type(module) is RoutedExperts:
            module.__class__, module.live = _EvenlyRouted, live
        elif hasattr(module, "of_grids"):
            module.__class__ = _tower_of(type(module))
