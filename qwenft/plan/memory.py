"""What a step holds at its peak, as a plan says it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping


@attrs.frozen
class LayerBytes:
    """What the layers of one kind keep for backward.

    Args:
        kind: "linear_attention" or "full_attention".
        layers: how many there are.
        kept: bytes of each, from its forward pass to its backward pass.
    """

    kind: str
    layers: int
    kept: int


@attrs.frozen
class MemoryReport:
    """The most that a process holds at once in a step, where the model computes: counted, live tensors alone.

    Args:
        by_component: bytes at that moment, which add up to the peak: of frozen "weights", "trained" parameters,
            "optimizer", "gradients", "activations" that forward keeps for backward, "loss", "inputs", and
            "working", what a layer needs while it computes.
        moment: where in the step that is, in words.
        layers: what each kind of layer keeps.
        tokens: of the micro-batch: the one of the data that takes most, or a full row where there are none.
        supervised: of these tokens.
    """

    by_component: Mapping[str, int]
    moment: str
    layers: tuple[LayerBytes, ...]
    tokens: int
    supervised: int

    @property
    def peak_bytes(self) -> int:
        """Live tensors at the peak; what CUDA's context and its allocator take is not among them."""
        return sum(self.by_component.values())
