"""Softmax attention through torch's FlexAttention, with a rule of who sees whom that research can replace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenft.backends.requirements import before_ampere
from qwenft.capabilities import AttentionBackend, Availability

if TYPE_CHECKING:
    from torch import Tensor

    from qwenft.capabilities import AttentionProblem
    from qwenft.kernels.layout import SequenceLayout
    from qwenft.machine import Machine


class FlexAttention(AttentionBackend):
    """torch.nn.attention.flex_attention: one compiled kernel on a GPU, a masked softmax on a CPU.

    A subclass that overrides :meth:`visible` is an attention of its own, forward and backward, packed or not. It
    means to compute something else than the model was trained with, so it says ``exact = False``.

    Examples:
        >>> class SlidingWindow(FlexAttention):
        ...     exact = False
        ...
        ...     def __init__(self, window):
        ...         self.window = window
        ...
        ...     def visible(self, query_position, key_position):
        ...         distance = query_position - key_position
        ...         return (distance >= 0) & (distance < self.window)
        >>> SlidingWindow(512)
        SlidingWindow(window=512)
    """

    name = "flex_attention"
    supports_packing = True
    uses_flash_lib = False
    traceable = False

    def availability(self, machine: Machine) -> Availability:
        """On a CPU; on GPUs from Ampere on where Triton is installed, through which torch compiles the kernel."""
        if machine.device == "cpu":
            return Availability(usable=True)
        # Torch compiles no bfloat16 for older GPUs, and its blocks for 256 head dims do not fit into them.
        if (reason := before_ampere(machine)) is not None:
            return Availability(usable=False, reason=reason)
        if machine.version_of("triton") is None:
            reason = "torch compiles it with Triton, which is not installed"
            return Availability(usable=False, reason=reason, remedy="pip install triton")
        return Availability(usable=True)

    def refuses(self, problem: AttentionProblem) -> str | None:
        """Head dims on a GPU that torch's kernel does not take, or for which its blocks grow too large."""
        if problem.device == "cuda" and not 16 <= problem.head_dim <= 256:
            return f"on a GPU its heads have 16 to 256 dims, these have {problem.head_dim}"
        return None

    def visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        """Whether a query sees a key of its own document: here, each that is no later.

        Override it with elementwise torch operations and no ``if`` on their values, for a GPU's kernel is compiled
        from them. Other documents stay hidden whatever it returns. It is not asked where ``causal`` is False, as
        in the vision tower, whose patches all see each other.

        Args:
            query_position: the query's place in its document, from 0; int32, of any shape.
            key_position: the key's, of a shape that broadcasts.

        Returns:
            A bool for each pair. A query that sees nothing gets zeros.
        """
        return key_position <= query_position

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: SequenceLayout,
        scale: float,
        causal: bool = True,
    ) -> Tensor:
        """Attend by :func:`qwenft.kernels.flex.flex_attention`, whose arguments these are."""
        from qwenft.kernels.flex import flex_attention

        return flex_attention(query, key, value, layout=layout, scale=scale, causal=causal, rule=self.visible)
