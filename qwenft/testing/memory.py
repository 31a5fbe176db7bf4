"""The memory of a real step, to compare with what a plan says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qwenft.data.stream import Batch
    from qwenft.training.engine import Prepared


def measured_peak(prepared: Prepared, batches: Sequence[Batch]) -> int:
    """The most bytes of tensors that are there at once in a step on a CPU, which trains on these batches twice.

    Weights with their scales, moments and the largest batch are there before; what the step allocates is counted
    by torch's profiler, which sees every allocation of torch and knows nothing of plans.

    Args:
        prepared: on a CPU.
        batches: of one step.
    """
    prepared.step(batches)  # moments are there from the first one on
    sizes = [part.numel() * (part.grad_dtype or part.dtype).itemsize for part in prepared.trained.values()]
    gradients = (max if prepared.training.optimizer_in_backward else sum)(sizes)
    batch = max(batches, key=lambda batch: batch.layout.total)
    given = [batch.input_ids, batch.labels]
    if batch.vision is not None:
        given += [batch.vision.pixel_values, batch.vision.places, batch.vision.position_ids]
    before = prepared.state_bytes - gradients + sum(tensor.nbytes for tensor in given)
    return before + _most_allocated(lambda: prepared.step(batches))


def _most_allocated(function: Callable[[], object]) -> int:
    """What is allocated and not freed, at most, while a function runs: bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        function()
    assert run.profiler is not None
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        largest = max(largest, live)
    return largest
