"""Documents, rows and steps of the flat stream."""

from __future__ import annotations

import itertools
import math
import random
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from qwenft.data.masking import IGNORED
from qwenft.data.media import positions_of
from qwenft.data.packing import pack
from qwenft.data.reading import read_ahead
from qwenft.kernels.layout import SequenceLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from qwenft.data.document import Document
    from qwenft.data.media import Medium
    from qwenft.errors import DataError


@attrs.frozen
class Place:
    """Where a stream goes on; the same for any number of ranks.

    Args:
        epoch: counted from 0.
        row: how many of its rows are behind; of its window's, where it is streamed.
        read: how many rows of a streamed source are before the window.
        digest: a sha256 of these, which shows that the source gives the same ones again.
    """

    epoch: int = 0
    row: int = 0
    read: int = 0
    digest: str = ""


def places_text(documents: Sequence[tuple[str, int]]) -> str:
    """The files and rows of some documents, for a message."""
    more = f" and {len(documents) - 8} more" if len(documents) > 8 else ""
    return ", ".join(f"{file}, row {row}" for file, row in documents[:8]) + more


@attrs.frozen(eq=False)
class VisionInputs:
    """The images and videos of a micro-batch, in the order of the stream.

    Args:
        pixel_values: [P, C * T * p * p] float32, the patches of all of them.
        grid_thw: [M, 3] int64, frames, rows and columns of patches of each.
        places: [V] int64, the positions of the stream that their features take.
        position_ids: [3, T] int64, where every token of the stream stands in time, height and width.
    """

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    places: torch.Tensor
    position_ids: torch.Tensor

    @classmethod
    def from_documents(cls, documents: Sequence[Document], pixels: Sequence[torch.Tensor]) -> VisionInputs | None:
        """Those of a row of documents; None where it has no image.

        Args:
            documents: of the row.
            pixels: the patches of every medium of theirs.
        """
        if not pixels:
            return None
        places, positions, start = [], [], 0
        for document in documents:
            positions.append(positions_of(document))
            places += [
                start + first + np.arange(medium.frame_tokens)
                for medium in document.media
                for first in medium.starts
            ]
            start += len(document)
        grids = [medium.grid for document in documents for medium in document.media]
        return cls(
            pixel_values=torch.cat(list(pixels)),
            grid_thw=torch.tensor(grids),
            places=torch.from_numpy(np.concatenate(places)),
            position_ids=torch.from_numpy(np.concatenate(positions, axis=1)),
        )

    @classmethod
    def blank(cls, layout: SequenceLayout, tower: Any) -> VisionInputs:
        """A black image of which no token takes the features: it goes through the tower, and nothing sees it.

        Args:
            layout: of the row.
            tower: the config of the tower.
        """
        side = tower.spatial_merge_size
        values = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
        return cls(
            pixel_values=torch.zeros(side**2, values, device=layout.device),
            grid_thw=torch.tensor([[1, side, side]]),
            places=torch.empty(0, dtype=torch.int64, device=layout.device),
            position_ids=layout.position_ids.expand(3, -1),
        )

    def to(self, device: torch.device | str) -> VisionInputs:
        """The same on ``device``; grids are read on the host."""
        tensors = (self.pixel_values, self.places, self.position_ids)
        pixels, places, positions = (tensor.to(device) for tensor in tensors)
        return VisionInputs(pixels, self.grid_thw, places, positions)

    def between(self, start: int, stop: int) -> VisionInputs | None:
        """Those of the tokens ``start`` to ``stop``, which are whole documents."""
        patches = self.grid_thw.prod(1)
        tokens = patches * len(self.places) // patches.sum()
        firsts = self.places.cpu()[tokens.cumsum(0) - tokens]
        mine = (firsts >= start) & (firsts < stop)
        if not mine.any():
            return None
        of_pixels, of_places = (
            mine.repeat_interleave(count).to(self.places.device) for count in (patches, tokens)
        )
        return VisionInputs(
            self.pixel_values[of_pixels],
            self.grid_thw[mine],
            self.places[of_places] - start,
            self.position_ids[:, start:stop],
        )


@attrs.frozen(eq=False)
class Batch:
    """A micro-batch: one row of the stream.

    Args:
        input_ids: [T] int64.
        labels: [T] int64: the token that each position is trained to predict, or -100.
        layout: where its documents begin.
        weights: [T] float32, each position's weight in the loss; 1 everywhere where None.
        documents: (file, row) of each document.
        following: where the stream goes on behind the step that this is part of; None where it is of no stream.
        vision: its images and videos; None where it has none.
        waits: it is another rank's, and here but for the collectives that all take part in.
        positions: [S] int64, where labels are tokens; None until :meth:`located`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    layout: SequenceLayout
    weights: torch.Tensor | None = None
    documents: tuple[tuple[str, int], ...] = ()
    following: Place | None = None
    vision: VisionInputs | None = None
    waits: bool = False
    positions: torch.Tensor | None = None

    @classmethod
    def from_documents(cls, documents: Sequence[Document], pixels: Sequence[torch.Tensor] = ()) -> Batch:
        """One row that holds these documents, and the patches of all of their media."""
        return cls(
            input_ids=torch.from_numpy(np.concatenate([d.input_ids for d in documents]).astype(np.int64)),
            labels=torch.from_numpy(np.concatenate([d.labels for d in documents]).astype(np.int64)),
            layout=SequenceLayout.from_lengths([len(d) for d in documents]),
            weights=_weights(documents),
            documents=tuple((d.file, d.row) for d in documents),
            vision=VisionInputs.from_documents(documents, pixels),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same micro-batch on ``device``."""
        return attrs.evolve(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            layout=self.layout.to(device),
            weights=None if self.weights is None else self.weights.to(device),
            vision=None if self.vision is None else self.vision.to(device),
            positions=None if self.positions is None else self.positions.to(device),
        )

    def located(self) -> Batch:
        """The same micro-batch with its positions; on the host nobody has to wait for a device to tell them."""
        if self.positions is not None:
            return self
        return attrs.evolve(self, positions=(self.labels != IGNORED).nonzero()[:, 0])

    def waiting(self) -> Batch:
        """The same micro-batch where another rank trains on it: no token of it is trained."""
        return attrs.evolve(self, labels=torch.full_like(self.labels, IGNORED), waits=True, positions=None)

    def split(self) -> list[Batch]:
        """A micro-batch for each of its documents."""
        lengths = list(self.layout.lengths)
        ids, labels = self.input_ids.split(lengths), self.labels.split(lengths)
        weights = None if self.weights is None else self.weights.split(lengths)
        return [
            Batch(
                input_ids=ids[n],
                labels=labels[n],
                layout=SequenceLayout.from_lengths([length], device=self.input_ids.device),
                weights=None if weights is None else weights[n],
                documents=self.documents[n : n + 1],
                vision=None if self.vision is None else self.vision.between(*self.layout.starts[n : n + 2]),
            )
            for n, length in enumerate(lengths)
        ]

    @property
    def tokens(self) -> float:
        """The sum of the weights of supervised positions: what a mean loss divides by."""
        positions = self.located().positions
        assert positions is not None
        if self.weights is None:
            return float(len(positions))
        return float(self.weights[positions].sum(dtype=torch.float64))


def _weights(documents: Sequence[Document]) -> torch.Tensor | None:
    """[T] float32, or None where every document weighs its tokens alike."""
    if all(document.weights is None for document in documents):
        return None
    ones = [np.ones(len(d), dtype=np.float32) if d.weights is None else d.weights for d in documents]
    return torch.from_numpy(np.concatenate(ones))


class Stream(ABC):
    """Documents in rows, and rows in steps, the same for the same seed and from any place on.

    Args:
        capacity: of a row, in tokens.
        packed: rows hold as many documents as fit; else one each.
        tokens_per_step: the most tokens of a step over all ranks; one row a rank where None.
        seed: of shuffling and packing.
        rank: whose micro-batches are made.
        ranks: how many share a step.
        pixels: of an image or a video, read where it lies; None for data without any.
        workers: processes that read them ahead.
    """

    def __init__(
        self,
        *,
        capacity: int,
        packed: bool,
        tokens_per_step: int | None = None,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        pixels: Callable[[Medium], np.ndarray] | None = None,
        workers: int = 0,
    ) -> None:
        self.capacity = capacity
        self.packed = packed
        self.tokens_per_step = tokens_per_step
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.pixels = pixels
        self.workers = workers
        self._skipped: list[DataError] = []

    def take_skipped(self) -> list[DataError]:
        """The errors of rows that were read and left out since this was last asked."""
        taken = self._skipped[:]
        self._skipped.clear()
        return taken

    @abstractmethod
    def rows_from(self, place: Place) -> Iterator[tuple[Place, list[Document]]]:
        """Every row of the place's epoch from there on, with the place behind it."""

    def steps(self, place: Place = Place()) -> Iterator[tuple[Place, list[list[Document]]]]:
        """The rows of every step of the place's epoch from there on, with the place behind it.

        A step takes as many rows as fit in ``tokens_per_step``, whatever the number of ranks.
        """
        step: list[list[Document]] = []
        room, behind = 0, place
        for following, row in self.rows_from(place):
            tokens = sum(map(len, row))
            if step and (len(step) == self.ranks if self.tokens_per_step is None else tokens > room):
                yield behind, step
                step = []
            if not step:
                room = self.tokens_per_step or 0
            step.append(row)
            room -= tokens
            behind = following
        if step:
            yield behind, step

    def batches(self, place: Place = Place()) -> Iterator[list[Batch]]:
        """This rank's micro-batches of every step of the place's epoch from there on.

        All ranks have as many in a step, and at a time rows of about as many tokens; one that is left without a
        row takes the step's shortest, untrained.
        """
        steps, ahead = itertools.tee(self.steps(place))
        batches = self.loaded(row for _, step in ahead for row, _ in self._mine(step))
        for following, step in steps:
            mine = self._mine(step)
            loaded = itertools.islice(batches, len(mine))
            yield [
                attrs.evolve(batch if is_own else batch.waiting(), following=following)
                for batch, (_, is_own) in zip(loaded, mine, strict=True)
            ]

    def evaluated(self) -> Iterator[Batch]:
        """This rank's micro-batches of all documents, once each; of all ranks as many."""
        rows = (row for _, row in self.rows_from(Place()))
        steps = iter(lambda: list(itertools.islice(rows, self.ranks)), [])
        mine, ahead = itertools.tee(pair for step in steps for pair in self._mine(step))
        for batch, (_, is_own) in zip(self.loaded(row for row, _ in ahead), mine, strict=True):
            yield batch if is_own else batch.waiting()

    def _mine(self, step: list[list[Document]]) -> list[tuple[list[Document], bool]]:
        """The rows of a step that are this rank's, as many as any rank has, and whether each is so but to wait."""
        if self.ranks == 1:
            return [(row, True) for row in step]
        # The layers of all ranks wait for each other, and so their rows are to be alike.
        longest_first = sorted(step, key=lambda row: -sum(map(len, row)))
        missing = -len(step) % self.ranks
        rows = [(row, True) for row in longest_first] + missing * [(longest_first[-1], False)]
        return rows[self.rank :: self.ranks]

    def loaded(self, rows: Iterable[list[Document]]) -> Iterator[Batch]:
        """A micro-batch of each row, whose images and videos are read ahead.

        Raises:
            DataError: one is broken, or has changed since it was measured.
        """
        if self.pixels is None:
            yield from map(Batch.from_documents, rows)
            return
        rows, ahead = itertools.tee(rows)
        for row, pixels in zip(rows, read_ahead(ahead, self.pixels, self.workers), strict=True):
            yield Batch.from_documents(row, pixels)

    def arranged(self, lengths: Sequence[int], seed: int) -> list[list[int]]:
        """The rows of documents of these lengths, in the order of training, as their indices."""
        if self.packed:
            return pack(lengths, self.capacity, seed=seed)
        order = list(range(len(lengths)))
        random.Random(seed).shuffle(order)
        return [[document] for document in order]


class MapStream(Stream):
    """The rows of documents that are all at hand, each of them once an epoch unless its ``times`` say otherwise.

    Args:
        documents: none longer than the capacity.
        options: of :class:`Stream`.
    """

    def __init__(self, documents: Sequence[Document], **options: Any) -> None:
        super().__init__(**options)
        if not any(document.media for document in documents):
            self.pixels = None
        self.documents = documents
        self.lengths = [len(document) for document in documents]
        alike: dict[float, list[int]] = {}
        for number, document in enumerate(documents):
            if document.times != 1:
                alike.setdefault(document.times, []).append(number)
        self._offsets: list[
            tuple[int, float, float]
        ] = []  # document, times, where in the course of epochs it is due
        shuffle = random.Random(self.seed)
        for times, numbers in alike.items():
            shuffle.shuffle(numbers)
            self._offsets += [(number, times, place / len(numbers)) for place, number in enumerate(numbers)]

    def rows(self, epoch: int = 0) -> list[list[int]]:
        """The document indices of every row of an epoch, in the order of training."""
        taken = self._taken(epoch)
        rows = self.arranged([self.lengths[document] for document in taken], 1_000_003 * self.seed + epoch)
        return [[taken[place] for place in row] for row in rows]

    def _taken(self, epoch: int) -> list[int]:
        """The documents of an epoch, each as often as it is taken.

        One that is taken ``times`` an epoch has its turns evenly spaced over the epochs, and those of its like
        are spread between them, so that every epoch takes as many and all are seen alike.
        """
        copies = [1] * len(self.documents)
        for document, times, offset in self._offsets:
            copies[document] = math.floor((epoch + 1) * times + offset) - math.floor(epoch * times + offset)
        return [document for document, count in enumerate(copies) for _ in range(count)]

    def rows_from(self, place: Place) -> Iterator[tuple[Place, list[Document]]]:
        """Every row of the place's epoch from there on, with the place behind it."""
        for number, row in enumerate(self.rows(place.epoch)[place.row :], start=place.row + 1):
            yield Place(place.epoch, number), [self.documents[document] for document in row]

    def step_count(self, epoch: int = 0) -> int:
        """How many steps an epoch has."""
        return sum(1 for _ in self.steps(Place(epoch)))
