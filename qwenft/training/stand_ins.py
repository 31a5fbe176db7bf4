"""What stands in a simulation for modules that ask tensors for values, and for kernels that cannot be followed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qwenft.capabilities import AttentionBackend, LinearAttentionBackend, Workspace
from qwenft.kernels.experts import together_on
from qwenft.kernels.layout import SequenceLayout
from qwenft.models.bind import causal_of
from qwenft.models.precision import RoutedExperts
from qwenft.training.live_bytes import HOST

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from qwenft.training.live_bytes import LiveBytes

T = TypeVar("T")


class HostLayout(SequenceLayout):
    """A layout of which everything that is derived has values: what is branched on is known."""

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns, of tensors with values."""
        with unset_fake_temporarily():
            return super().derived(key, make)


class AttentionStandIn(AttentionBackend):
    """Holds what a backend declares."""

    name, supports_packing, uses_flash_lib = "declared", True, False

    def __init__(self, saved: Mapping[str, int], workspace: Workspace) -> None:
        self.saved, self.space = saved, workspace

    def attend(self, query: Any, key: Any, value: Any, **_: Any) -> Any:
        """[S, H, D] of nothing."""
        return _Declared.apply(self.saved, self.space, True, torch.empty_like(query), query, key, value)


class LinearStandIn(LinearAttentionBackend):
    """Likewise; its convolution keeps its input."""

    name, supports_packing, uses_flash_lib = "declared", True, False

    def __init__(self, saved: Mapping[str, int], workspace: Workspace) -> None:
        self.saved, self.space = saved, workspace

    def short_conv(self, x: Any, weight: Any, bias: Any, **_: Any) -> Any:
        """[T, C] of nothing."""
        given = [tensor for tensor in (x, weight, bias) if tensor is not None]
        return _Declared.apply({}, Workspace(), True, torch.empty_like(x), *given)

    def delta_rule(self, query: Any, key: Any, value: Any, log_decay: Any, beta: Any, **_: Any) -> Any:
        """[T, V, E] of nothing."""
        output = torch.empty_like(value, memory_format=torch.contiguous_format)
        return _Declared.apply(self.saved, self.space, False, output, query, key, value, log_decay, beta)


class _Declared(torch.autograd.Function):
    """Holds as many bytes as a computation is said to."""

    @staticmethod
    def forward(
        ctx: Any,
        saved: Mapping[str, int],
        space: Workspace,
        keeps_inputs: bool,
        output: torch.Tensor,
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        kept = [torch.empty(count, dtype=torch.uint8) for count in saved.values()]
        torch.empty(space.forward, dtype=torch.uint8)
        ctx.save_for_backward(*(inputs if keeps_inputs else ()), *kept)
        ctx.space, ctx.like = space, [(tensor.shape, tensor.dtype) for tensor in inputs]
        return output

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]  # as autograd calls it
        kept = ctx.saved_tensors
        workspace = torch.empty(ctx.space.backward, dtype=torch.uint8)
        asked = ctx.needs_input_grad[4:]
        grads = [
            torch.empty(shape, dtype=dtype) if wanted else None
            for (shape, dtype), wanted in zip(ctx.like, asked, strict=True)
        ]
        del kept, workspace
        return None, None, None, None, *grads


class _EvenlyRouted(RoutedExperts):
    """Experts that are chosen alike: as many as can be have work, and what is dense is as large as it gets."""

    def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any, **adapters: Any) -> Any:
        each = -(-top_k_index.numel() // self.num_experts)
        # What is made of experts is gone before the next ones: two groups of them will do.
        busy = 2 * together_on(hidden_states, self.gate_up_proj)
        self.ends = [min(each * min(expert + 1, busy), top_k_index.numel()) for expert in range(self.num_experts)]
        return super().forward(hidden_states, top_k_index, top_k_weights, **adapters)


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
        return packed

    def offloaded(function: Any, *args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(pack, torch.empty_like):
            return checkpoint(function, *args, **kwargs, use_reentrant=False)

    for module in causal_of(model).modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = offloaded  # noqa: SLF001 - where transformers keeps its own


def know_values(model: Any) -> None:
    """Tell modules what in a step they would ask tensors for."""
    for module in causal_of(model).modules():
        if type(module) is RoutedExperts:
            module.__class__ = _EvenlyRouted
        elif hasattr(module, "of_grids"):
            module.__class__ = _tower_of(type(module))
