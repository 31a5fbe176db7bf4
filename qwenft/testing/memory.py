"""The memory of a real step, to compare with what a plan says."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

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
    """What is allocated and not freed, at most, while a function runs: bytes.

    What a collective allocates within itself is left out: gloo copies what it is given, and frees the copies in
    threads of its own, which the profiler does not see.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write lines of its own
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        function()
    assert run.profiler is not None
    assert run.profiler.kineto_results is not None
    live = largest = 0
    of_collectives: set[int] = set()
    for event, is_in_collective in sorted(
        _allocations(run.profiler.kineto_results.experimental_event_tree()),
        key=lambda pair: pair[0].start_time_ns,
    ):
        place, count = event.extra_fields.ptr, event.extra_fields.alloc_size
        if is_in_collective and count > 0:
            of_collectives.add(place)
        elif count > 0 or place not in of_collectives:
            of_collectives.discard(place)
            live += count
            largest = max(largest, live)
        else:
            of_collectives.discard(place)
    return largest


def _allocations(events: Iterable[Any], *, is_in_collective: bool = False) -> Iterator[tuple[Any, bool]]:
    """Every allocation (of a positive size) and freeing below some events, and whether a collective made it."""
    for event in events:
        if event.typed[0] == _EventType.Allocation:
            yield event, is_in_collective
        inside = is_in_collective or event.name.startswith("c10d::")
        yield from _allocations(event.children, is_in_collective=inside)
