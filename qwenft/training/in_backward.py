"""Parameters that are updated within backward, so that the gradients of a model never exist together."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator


@contextmanager
def step_in_backward(
    optimizer: torch.optim.Optimizer, parameters: Collection[torch.nn.Parameter]
) -> Iterator[list[torch.Tensor]]:
    """Let a backward pass update each parameter as soon as its gradient is whole, and free it (arXiv:2306.09782).

    Nothing of the pass reads a parameter after its gradient is whole: autograd hands it over when every use of it
    has been differentiated. The optimizer skips what has no gradient, which is all but one parameter.

    Args:
        optimizer: over the parameters.
        parameters: whose gradients are not there yet.

    Yields:
        The norms of the gradients, float32 scalars, which fill up during the pass.
    """
    norms: list[torch.Tensor] = []

    def update(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        optimizer.step()
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(update) for parameter in parameters]
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()
