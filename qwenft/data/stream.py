"""Documents, rows and steps of the flat stream."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch

from qwenft.data.masking import IGNORED
from qwenft.data.packing import pack
from qwenft.kernels.layout import SequenceLayout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qwenft.data.document import Document


@attrs.frozen(eq=False)
class Batch:
    """A micro-batch: one row of the stream.

    Args:
        input_ids: [T] int64.
        labels: [T] int64: the token that each position is trained to predict, or -100.
        layout: where its documents begin.
        weights: [T] float32, each position's weight in the loss; 1 everywhere where None.
        documents: (file, row) of each document.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    layout: SequenceLayout
    weights: torch.Tensor | None = None
    documents: tuple[tuple[str, int], ...] = ()

    @classmethod
    def from_documents(cls, documents: Sequence[Document]) -> Batch:
        """One row that holds these documents."""
        return cls(
            input_ids=torch.from_numpy(np.concatenate([d.input_ids for d in documents]).astype(np.int64)),
            labels=torch.from_numpy(np.concatenate([d.labels for d in documents]).astype(np.int64)),
            layout=SequenceLayout.from_lengths([len(d) for d in documents]),
            weights=_weights(documents),
            documents=tuple((d.file, d.row) for d in documents),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same micro-batch on ``device``."""
        return attrs.evolve(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            layout=self.layout.to(device),
            weights=None if self.weights is None else self.weights.to(device),
        )

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
            )
            for n, length in enumerate(lengths)
        ]

    @property
    def tokens(self) -> float:
        """The sum of the weights of supervised positions: what a mean loss divides by."""
        supervised = self.labels != IGNORED
        if self.weights is None:
            return float(supervised.sum())
        return float(self.weights[supervised].sum(dtype=torch.float64))


def _weights(documents: Sequence[Document]) -> torch.Tensor | None:
    """[T] float32, or None where every document weighs its tokens alike."""
    if all(document.weights is None for document in documents):
        return None
    ones = [np.ones(len(d), dtype=np.float32) if d.weights is None else d.weights for d in documents]
    return torch.from_numpy(np.concatenate(ones))


class Stream:
    """The rows and steps of documents, the same for the same seed and epoch.

    Args:
        documents: none longer than ``capacity``.
        capacity: of a row, in tokens.
        packed: rows hold as many documents as fit; else one each.
        tokens_per_step: the most tokens of a step; one row where None.
        seed: of shuffling and packing.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        capacity: int,
        packed: bool,
        tokens_per_step: int | None = None,
        seed: int = 0,
    ) -> None:
        self.documents = documents
        self.lengths = [len(document) for document in documents]
        self.capacity = capacity
        self.packed = packed
        self.tokens_per_step = tokens_per_step
        self.seed = seed
        self._counts: dict[int, int] = {}

    def rows(self, epoch: int = 0) -> list[list[int]]:
        """The document indices of every row of an epoch, in the order of training."""
        seed = 1_000_003 * self.seed + epoch
        if self.packed:
            return pack(self.lengths, self.capacity, seed=seed)
        order = list(range(len(self.lengths)))
        random.Random(seed).shuffle(order)
        return [[document] for document in order]

    def steps(self, epoch: int = 0) -> list[list[list[int]]]:
        """The rows of every step: as many as fit in ``tokens_per_step``."""
        steps: list[list[list[int]]] = []
        room = 0
        for row in self.rows(epoch):
            tokens = sum(self.lengths[document] for document in row)
            if not steps or self.tokens_per_step is None or tokens > room:
                steps.append([])
                room = self.tokens_per_step or 0
            steps[-1].append(row)
            room -= tokens
        return steps

    def step_count(self, epoch: int = 0) -> int:
        """How many steps an epoch has; packed once for it."""
        if epoch not in self._counts:
            self._counts[epoch] = len(self.steps(epoch))
        return self._counts[epoch]

    def batches(self, epoch: int = 0, first: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of every step of an epoch, from its step ``first`` on."""
        for step in self.steps(epoch)[first:]:
            yield [self.batch(row) for row in step]

    def batch(self, row: Sequence[int]) -> Batch:
        """The micro-batch that holds these documents."""
        return Batch.from_documents([self.documents[document] for document in row])
