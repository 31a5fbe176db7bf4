"""What a step holds at its peak, as a plan says it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from qwenft.display import Shown, bytes_text, html_bar, html_table, html_view

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qwenft.machine import Machine

MIB = 2**20
#: Of a process on a GPU: CUDA's context with its loaded kernels, and cuBLAS' workspaces.
_CONTEXT = 700 * MIB
#: NCCL's buffers of a process.
_COMMUNICATION = 300 * MIB
#: Blocks of the allocator that are reserved and not in use, as a share of the live tensors.
_RESERVED = 0.03
#: Python with torch and transformers, of a process on a CPU.
_INTERPRETER = 700 * MIB


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


@attrs.frozen(repr=False)
class MemoryReport(Shown):
    """The most that a process holds at once in a step, where the model computes: counted, live tensors alone.

    Args:
        by_component: bytes at that moment, which add up to the peak: of frozen "weights", "trained" parameters,
            "optimizer", "gradients", "activations" that forward keeps for backward, "loss", "inputs", and
            "working", what a layer needs while it computes.
        moment: where in the step that is, in words.
        layers: what each kind of layer keeps.
        tokens: of the micro-batch: the one of the data that takes most, or a full row where there are none.
        supervised: of these tokens.
        left_out: backends whose kernels could not be followed and declare nothing: what they hold for backward and
            while they run is not counted.
        assumed: bytes beside live tensors, which no simulation sees: of CUDA's context, its allocator, NCCL, or of
            Python. Rules of thumb, and apart from the peak.
    """

    by_component: Mapping[str, int]
    moment: str
    layers: tuple[LayerBytes, ...]
    tokens: int
    supervised: int
    left_out: tuple[str, ...] = ()
    assumed: Mapping[str, int] = attrs.field(factory=dict)

    @property
    def peak_bytes(self) -> int:
        """Live tensors at the peak; what is assumed is not among them."""
        return sum(self.by_component.values())

    @property
    def needed_bytes(self) -> int:
        """Live tensors at the peak and what is assumed beside them: what a device must have."""
        return self.peak_bytes + sum(self.assumed.values())

    def shown(self) -> list[tuple[str, str]]:
        """The peak and its parts, the largest first."""
        parts = sorted(self.by_component.items(), key=lambda part: -part[1])
        return [
            ("peak of live tensors", f"{bytes_text(self.peak_bytes)}, in {self.moment}"),
            *((f"  {name}", bytes_text(count)) for name, count in parts if count),
            ("of a row of", f"{self.tokens:,} tokens, {self.supervised:,} of them trained"),
            *(
                (f"a layer of {one.kind} keeps", f"{bytes_text(one.kept)} ({one.layers} layers)")
                for one in self.layers
            ),
            *((f"assumed: {name}", bytes_text(count)) for name, count in self.assumed.items()),
            ("needed", bytes_text(self.needed_bytes)),
            *((("NOT counted", f"what the kernels of {', '.join(self.left_out)} hold"),) if self.left_out else ()),
        ]

    def _repr_html_(self) -> str:
        parts = sorted(self.by_component.items(), key=lambda part: -part[1])
        bar = html_bar([part for part in parts if part[1]], bytes_text)
        return html_view("MemoryReport", bar, html_table((), self.shown()))


def assumed_bytes(machine: Machine, peak: int, *, ranks: int) -> dict[str, int]:
    """What a process takes beside its live tensors, of which there are ``peak`` bytes at most.

    On a GPU at hand the context and the kernels are there when the first tensor is; what is left free by others is
    not known to a plan. These are rules of thumb, none of them measured by a plan.
    """
    if machine.device == "cpu":
        return {"Python and its libraries": _INTERPRETER}
    found = {"CUDA's context": _CONTEXT, "its allocator's reserve": round(_RESERVED * peak)}
    return found | ({"NCCL's buffers": _COMMUNICATION} if ranks > 1 else {})
