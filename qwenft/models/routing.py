"""What the routers of a mixture of experts decided in a forward pass."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import torch
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

from qwenft.kernels.experts import slot_ends
from qwenft.models.bind import decoder_of

if TYPE_CHECKING:
    from collections.abc import Iterator


@attrs.define(eq=False)
class Routing:
    """The decisions of every router, in the order of the layers.

    Args:
        logits: [T, E] a layer, with their graph.
        counts: [E] int64 a layer: how many times each expert was chosen.
    """

    logits: list[torch.Tensor] = attrs.field(factory=list)
    counts: list[torch.Tensor] = attrs.field(factory=list)

    def load_balancing_loss(self, per_token: int) -> torch.Tensor:
        """How unevenly experts are chosen, over all layers; ``per_token`` where all are chosen alike.

        It is transformers' own (arXiv:2101.03961, equations 4 to 6).
        """
        experts = self.logits[0].shape[-1]
        loss: torch.Tensor = moe.load_balancing_loss_func(tuple(self.logits), experts, per_token)
        return loss


@contextmanager
def recorded_routing(model: Any) -> Iterator[Routing]:
    """Collect what routers decide while the context is open; layers that are computed again later are not in it.

    Args:
        model: bound; of a dense one the record stays empty.
    """
    routing = Routing()

    def record(router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> None:
        logits, _, chosen = output
        routing.logits.append(logits)
        ends = slot_ends(chosen.flatten().sort()[0], router.num_experts)
        routing.counts.append(torch.diff(ends, prepend=ends.new_zeros(1)))

    routers = [m for m in decoder_of(model).modules() if isinstance(m, moe.Qwen3_5MoeTopKRouter)]
    hooks = [router.register_forward_hook(record) for router in routers]
    try:
        yield routing
    finally:
        for hook in hooks:
            hook.remove()
