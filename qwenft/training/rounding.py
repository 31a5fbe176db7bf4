"""Stochastic rounding: bfloat16 weights that lose no update on average (arXiv:2010.06192).

A bfloat16 weight has 8 bits of mantissa, so that an update below 1/512 of it would be rounded away, every time.
Here the update is computed in float32, and its result goes to one of the two nearest bfloat16 values by chance,
the nearer the likelier: the mean is the float32 result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_BUCKET_ELEMENTS = 2**26  # float32 copies of so many weights exist at a time: 256 MiB


class StochasticRounding(torch.optim.Optimizer):
    """An optimizer whose bfloat16 parameters are updated in float32 and rounded by chance.

    Chance is torch's own of the parameters' device: seeded, saved and restored with it.

    Args:
        optimizer: any; it sees float32 parameters and gradients, and its state and groups are those of this one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self.state = optimizer.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; the gradients of bfloat16 ones are taken away."""
        assert closure is None
        try:
            for group in self.param_groups:
                for bucket in _buckets([p for p in group["params"] if p.grad is not None]):
                    self.optimizer.param_groups = [{**group, "params": bucket}]
                    self._update(bucket)
        finally:
            self.optimizer.param_groups = self.param_groups

    def _update(self, bucket: Sequence[torch.nn.Parameter]) -> None:
        rounded = [(parameter, parameter.data) for parameter in bucket if parameter.dtype == torch.bfloat16]
        for parameter, weights in rounded:
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None
            parameter.data = weights.float()
            parameter.grad = gradient.float()
        self.optimizer.step()
        for parameter, weights in rounded:
            parameter.grad = None
            weights.copy_(round_stochastically(parameter.data))
            parameter.data = weights


def round_stochastically(values: torch.Tensor) -> torch.Tensor:
    """One of the two bfloat16 neighbours of each value, the nearer the likelier.

    The 16 bits that bfloat16 lacks are a fraction of the distance between the two; a random 16-bit number is
    added to them, and what is left of them is cut off.

    Args:
        values: float32, finite, of any shape.

    Returns:
        bfloat16, of the same shape.
    """
    noise = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device)
    return noise.add_(values.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parts of about as many elements, of one parameter at least."""
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
