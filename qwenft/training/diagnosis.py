"""Where numbers stop being finite, and which losses are out of the ordinary."""

from __future__ import annotations

import statistics
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from qwenft.models.lora import base_name, unwrapped

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

RECENT = 64  # losses, to which another one is compared
#: Of a loss that leaps: how many median deviations and nats a token above the median, of how many losses at least.
_SPREADS, _NATS, _FEWEST = 10.0, 0.02, 16


@contextmanager
def first_not_finite(model: Any) -> Iterator[list[str]]:
    """Note the first module whose output is not finite; of nested ones the innermost.

    Yields:
        No name, or the one of the module.
    """
    found: list[str] = []

    def look(_module: Any, _given: Any, output: Any, *, name: str) -> None:
        if not found and not _is_finite(output):
            found.append(unwrapped(base_name(name)))

    handles = [
        module.register_forward_hook(partial(look, name=name)) for name, module in model.named_modules() if name
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def last_not_finite(gradients: Mapping[str, torch.Tensor | None]) -> str | None:
    """Of gradients by the names of their parameters, in the order of forward, the last that is not finite.

    It is the first that backward came to.
    """
    found = [name for name, gradient in gradients.items() if gradient is not None and not _is_finite(gradient)]
    return unwrapped(base_name(found[-1])) if found else None


def usual_loss(recent: Collection[float], loss: float) -> float | None:
    """The median of the losses before one that leaps out of them; None where it does not, or they are too few.

    It leaps where it lies above the median of the recent, of which there are 16 at least, by more than ten times
    their median absolute deviation, a tenth of the median and 0.02 nats a token.
    """
    if len(recent) < _FEWEST:
        return None
    usual = statistics.median(recent)
    spread = statistics.median(abs(other - usual) for other in recent)
    return usual if loss - usual > max(_SPREADS * spread, 0.1 * abs(usual), _NATS) else None


def _is_finite(value: Any) -> bool:
    """Whether all floating-point tensors of a module's output are."""
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return True
