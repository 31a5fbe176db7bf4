"""Softmax attention through torch's FlexAttention, with a rule of who sees whom that research can replace."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from qwenft.capabilities import AttentionBackend, Availability

if TYPE_CHECKING:
    from torch import Tensor

    from qwenft.capabilities import AttentionProblem
    from qwenft.kernels.layout import SequenceLayout
    from qwenft.machine import Machine


class FlexAttention(AttentionBackend):
    """torch.nn.attention.flex_attention: one compiled kernel on a GPU, a masked softmax on a CPU.

    A subclass that overrides :meth:`visible` is an attention of its own, forward and backward. It computes
    something else than the model was trained with, so it says ``exact = False``.

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

    def availability(self, machine: Machine) -> Availability:
        """On a GPU torch compiles the kernel with Triton, which needs compute capability 8.0 for bfloat16."""
        if machine.device == "cpu":
            return Availability(usable=True)
        if importlib.util.find_spec("triton") is None:
            return Availability(
                usable=False, reason="torch compiles it with Triton, which is missing", remedy="pip install triton"
            )
        return Availability(usable=True)

    def refuses(self, problem: AttentionProblem) -> str | None:
        """Head dims below 16, which torch's kernel for GPUs does not take."""
        if problem.device != "cpu" and problem.head_dim < 16:
            return f"torch's kernel takes head dims from 16, got {problem.head_dim}"
        return None

    def visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        """Whether a query sees a key of its own document: here, every key that is no later.

        Override it with torch operations on whole tensors and no ``if`` on their values: it is compiled into the
        kernel. It is never asked about two documents, nor where ``causal`` is False, as in the vision tower.

        Args:
            query_position: int32, the query's place in its document, from 0.
            key_position: int32 likewise, of a shape that broadcasts with it.

        Returns:
            Bools of the broadcast shape. A query that sees nothing gets zeros.
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
