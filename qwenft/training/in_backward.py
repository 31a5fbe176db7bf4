"""Parameters that are updated within backward, so that the gradients of a model never exist together."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import attrs
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qwenft.training.trained import Trained


@attrs.define(eq=False)
class Norms:
    """The norms of gradients that have been there, float32 scalars each.

    Args:
        of_whole: of parameters that this process has whole.
        of_shards: of those that it has a part of.
    """

    of_whole: list[torch.Tensor] = attrs.field(factory=list)
    of_shards: list[torch.Tensor] = attrs.field(factory=list)

    @property
    def whole(self) -> torch.Tensor:
        """Of the former together."""
        return _together(self.of_whole)

    @property
    def shards(self) -> torch.Tensor:
        """Of the latter together."""
        return _together(self.of_shards)


def _together(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack(list(norms))) if norms else torch.zeros(())


@contextmanager
def step_in_backward(optimizer: torch.optim.Optimizer, trained: Trained) -> Iterator[Norms]:
    """Let a backward pass update each parameter as soon as its gradient is whole, and free it (arXiv:2306.09782).

    Nothing of the pass reads a parameter after its gradient is whole: autograd hands it over when every use of it
    has been differentiated. The optimizer skips what has no gradient, which is all but one parameter. Of a sharded
    model the few small parameters that every process holds whole are updated behind the pass, together.

    Args:
        optimizer: over the parts of the parameters.
        trained: whose gradients are not there yet.

    Yields:
        The norms of the gradients, which fill up during the pass.
    """
    norms = Norms()

    def update(part: torch.Tensor, into: list[torch.Tensor]) -> None:
        assert part.grad is not None
        into.append(torch.linalg.vector_norm(part.grad, dtype=torch.float32))
        optimizer.step()
        part.grad = None

    def update_shard(_: torch.Tensor, part: torch.Tensor) -> None:
        update(part, norms.of_shards)

    handles = []
    for name, parameter in trained.parameters.items():
        part = trained.parts[name]
        if part is not parameter:
            handles.append(parameter.register_post_accumulate_grad_hook(partial(update_shard, part=part)))
        elif not trained.is_sharded:
            handles.append(parameter.register_post_accumulate_grad_hook(partial(update, into=norms.of_whole)))
    try:
        yield norms
        if trained.is_sharded:
            trained.sum_whole()
            for parameter in trained.whole:
                update(parameter, norms.of_whole)
    finally:
        for handle in handles:
            handle.remove()
