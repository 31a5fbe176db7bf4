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

#: Float32 copies of so many weights exist at a time: 128 MiB.
_AT_ONCE = 2**25
#: In 8 bits as many moments share a scale (bitsandbytes 0.50, optim/optimizer.py): a cut is never within them.
_BLOCK = 256


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
                    if self._is_cut(bucket[0]):
                        self._update_in_parts(bucket[0])
                    else:
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

    def _is_cut(self, parameter: torch.nn.Parameter) -> bool:
        # Moments that are paged are in memory that only bitsandbytes can allocate.
        is_paged = getattr(self.optimizer, "is_paged", False)
        return parameter.numel() > _AT_ONCE and parameter.dtype == torch.bfloat16 and not is_paged

    def _update_in_parts(self, parameter: torch.nn.Parameter) -> None:
        """Update one large parameter, some of its elements after the others: an optimizer looks at each alone."""
        weights, gradient, kept = parameter.data, parameter.grad, self.state.pop(parameter, {})
        assert gradient is not None
        count = weights.numel()
        size = -(-count // -(-count // _AT_ONCE) // _BLOCK) * _BLOCK
        found = []
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            parameter.grad = None
            parameter.data = weights.view(-1)[part].float()
            parameter.grad = gradient.view(-1)[part].float()
            self.state[parameter] = {key: _part(value, part, count) for key, value in kept.items()}
            self.optimizer.step()
            weights.view(-1)[part].copy_(round_stochastically(parameter.data))
            found.append(self.state.pop(parameter, {}))
        parameter.grad = None
        parameter.data = weights
        self.state[parameter] = {
            key: _together([state[key] for state in found], kept.get(key), weights) for key in found[-1]
        }


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


def _part(value: Any, part: slice, count: int) -> Any:
    """What an optimizer keeps of some of a parameter's elements: it shares the memory of what is kept of all."""
    if not _is_of_elements(value, count):
        return value.clone() if isinstance(value, torch.Tensor) and value.ndim == 0 else value
    return value.view(-1)[part.start * value.numel() // count : -(-part.stop * value.numel() // count)]


def _is_of_elements(value: Any, count: int) -> bool:
    """Whether a value has a number for each element of a large parameter, or for each block of them."""
    return isinstance(value, torch.Tensor) and value.numel() * _BLOCK >= count


def _together(found: Sequence[Any], kept: Any, weights: torch.Tensor) -> Any:
    """What an optimizer keeps of a parameter, of what it ``found`` for its parts and had ``kept`` of it before."""
    if kept is not None and _is_of_elements(kept, weights.numel()):
        return kept
    if kept is None and _is_of_elements(found[-1], weights.numel() // len(found)):
        whole = torch.cat(list(found))
        return whole.view_as(weights) if whole.numel() == weights.numel() else whole
    return found[-1]


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parts of about as many elements, of one parameter at least."""
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > _AT_ONCE:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
