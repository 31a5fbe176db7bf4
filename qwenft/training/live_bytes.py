"""Which storages of tensors are there when, and what is computed: a record of the operations of a step.

A step of a deep model is a step of a shallow one of which the middle is repeated: the record is divided into
segments, and :meth:`LiveBytes.peak` goes through some of them as often as they occur.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwenft.training.work import Work, work_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Self

FORWARD, LOSS, BACKWARD, UPDATE = "forward", "loss", "backward", "update"
#: The component of what is not where the model computes, and in no peak.
HOST = "host"
ACTIVATIONS, COLLECTIVES = "activations", "collectives"
_OF_COLLECTIVES = ("fsdp", "c10d")


@attrs.define(eq=False)
class Segment:
    """A part of a step.

    Args:
        phase: FORWARD, LOSS, BACKWARD or UPDATE.
        name: for people.
        group: neighbouring segments of one group are repeated together; None of those that occur once.
        events: numbers of storages as they come, and ``~number`` as they go.
        work: what its operations compute and move.
    """

    phase: str
    name: str
    group: str | None = None
    events: list[int] = attrs.field(factory=list)
    work: list[Work] = attrs.field(factory=list)


@attrs.frozen
class Peak:
    """When most is there.

    Args:
        by_component: bytes of each component.
        segment: the part of the step.
    """

    by_component: dict[str, int]
    segment: Segment


class LiveBytes(TorchDispatchMode):
    """Records every storage that operations make while the mode is on.

    Attributes:
        segments: of the step so far.
        sizes: bytes of every storage, by its number.
        times: of operations that stand for so many like them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.segments = [Segment(FORWARD, "before the first layer")]
        self.sizes: list[int] = []
        self.times = 1.0
        self._born: list[Segment] = []
        self._gone: dict[int, Segment] = {}
        self._numbers: dict[int, int] = {}  # of storages that are there, by their address
        self._labels: dict[int, str] = {}
        self._known: dict[int, Any] = {}  # held, so that no other storage takes their address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _forgotten(func, args):
            result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # questions, such as where a tensor is
            return result
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        if (work := work_of(func, args, kwargs or {}, result)) is not None:
            self.add_work(work)
        if func.namespace in _OF_COLLECTIVES:
            for tensor in _written(func, args, kwargs or {}, result):
                self.label(tensor, COLLECTIVES)
        return result

    def __enter__(self) -> Self:
        # FSDP lets weights that were gathered go, and gathers them anew, by resizing their storages: torch has no
        # other sign of it (its own torch/distributed/_tools/mem_tracker.py does the same).
        resize_storage = self._resize = torch.UntypedStorage.resize_

        def resize(storage: Any, count: int) -> Any:
            self._go(storage._cdata)  # noqa: SLF001
            resized = resize_storage(storage, count)
            if count:
                self._see(storage)
            return resized

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]  # it is put back
        entered: Self = super().__enter__()
        return entered

    def __exit__(self, *error: object) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave out what is there from step to step, and counted by other means."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = storage  # noqa: SLF001 - its only identity

    def label(self, tensor: torch.Tensor, component: str) -> None:
        """Say what a tensor is, whenever it was made."""
        number = self._numbers.get(tensor.untyped_storage()._cdata)  # noqa: SLF001
        if number is not None:
            self._labels[number] = component

    def add_work(self, work: Work) -> None:
        """Count what an operation takes."""
        self.segments[-1].work.append(
            attrs.evolve(work, operations=self.times * work.operations, moved=self.times * work.moved)
        )

    def begin(self, phase: str, name: str, group: str | None = None) -> None:
        """Begin a part of the step."""
        self.segments.append(Segment(phase, name, group))
        self.times = 1.0

    @property
    def phase(self) -> str:
        """Of the part that is being recorded."""
        return self.segments[-1].phase

    def _see(self, storage: Any) -> None:
        key = storage._cdata  # noqa: SLF001
        if key not in self._numbers and key not in self._known:
            self._come(storage, key)

    def _come(self, storage: Any, key: int) -> None:
        number = self._numbers[key] = len(self.sizes)
        self.sizes.append(storage.nbytes())
        self._born.append(self.segments[-1])
        self.segments[-1].events.append(number)
        weakref.finalize(storage, self._go, key)

    def _go(self, key: int) -> None:
        number = self._numbers.pop(key, None)
        if number is not None:  # one that was resized to nothing is gone already
            self._gone[number] = self.segments[-1]
            self.segments[-1].events.append(~number)

    def _component(self, number: int) -> str:
        """What a storage is, by when it was made and when it went."""
        if number in self._labels:
            return self._labels[number]
        born, gone = self._born[number].phase, self._gone.get(number)
        if born == LOSS:
            return "loss"
        is_kept = born == FORWARD and (gone is None or gone.phase != FORWARD)
        return ACTIVATIONS if is_kept else "working"

    def peak(self, start: Mapping[str, int], repeats: Mapping[str, int]) -> Peak:
        """The most that is there at once.

        Args:
            start: bytes of each component before the step.
            repeats: how often the segments of each group occur.
        """
        components = [self._component(number) for number in range(len(self.sizes))]
        sizes = [0 if what == HOST else size for what, size in zip(components, self.sizes, strict=True)]
        live = Counter(start)
        total = largest = sum(start.values())
        found = Peak(dict(live), self.segments[0])
        for segment in self._unrolled(repeats):
            for event in segment.events:
                number, sign = (event, 1) if event >= 0 else (~event, -1)
                live[components[number]] += sign * sizes[number]
                total += sign * sizes[number]
                if total > largest:
                    largest = total
                    found = Peak(dict(live), segment)
        return found

    def kept(self, segment: Segment) -> int:
        """The bytes of activations that are there behind a part of the step and were not before."""
        kept = {number: size for number, size in enumerate(self.sizes) if self._component(number) == ACTIVATIONS}
        return sum(kept.get(event, 0) if event >= 0 else -kept.get(~event, 0) for event in segment.events)

    def work(self, repeats: Mapping[str, int]) -> Iterator[Work]:
        """What all operations of the step take; ``repeats`` as for :meth:`peak`."""
        for segment in self._unrolled(repeats):
            yield from segment.work

    def _unrolled(self, repeats: Mapping[str, int]) -> Iterator[Segment]:
        for group, segments in itertools.groupby(self.segments, key=lambda segment: segment.group):
            together: Sequence[Segment] = list(segments)
            for _ in range(1 if group is None else repeats[group]):
                yield from together


@contextmanager
def _forgotten(func: Any, args: tuple[Any, ...]) -> Iterator[None]:
    """Have the cache of fake operations not hold on to a storage that an operation is given, as it does to all."""
    mode = getattr(args[0], "fake_mode", None) if func.overloadpacket is torch.ops.aten.set_ else None
    if mode is None:
        yield
        return
    mode.cache_enabled, before = False, mode.cache_enabled
    try:
        yield
    finally:
        mode.cache_enabled = before


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[torch.Tensor]:
    """What an operation returns, and the arguments that it writes to."""
    found = [result]
    for index, argument in enumerate(func._schema.arguments):  # noqa: SLF001 - which of them, only the schema says
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[index] if index < len(args) else kwargs.get(argument.name))
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
