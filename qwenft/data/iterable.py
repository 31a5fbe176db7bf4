"""Documents that are read and tokenised while training goes on."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import TYPE_CHECKING, Any

from qwenft.data.fitting import Counts, fitted
from qwenft.data.sources import read_rows
from qwenft.data.stream import Place, Stream
from qwenft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwenft.data.chat import ChatEncoder
    from qwenft.data.document import Document
    from qwenft.data.sources import Row
    from qwenft.specs.data import DataSpec


class IterableStream(Stream):
    """The rows of a source that is read a window at a time, whose documents are shuffled and packed together.

    Args:
        data: with a window.
        encoder: of the checkpoint.
        options: of :class:`Stream`.
    """

    def __init__(self, data: DataSpec, encoder: ChatEncoder, **options: Any) -> None:
        super().__init__(**options)
        self.data = data
        self.encoder = encoder

    def rows_from(self, place: Place) -> Iterator[tuple[Place, list[Document]]]:
        """Every row of the place's epoch from there on, with the place behind it.

        Raises:
            DataError: a row is wrong and not skipped, or the source gives other rows before the place than it did.
        """
        source = self._source(self._skipped)
        source.skip_to(place)
        done = place.row
        while True:
            before = source.place(place.epoch)
            documents = self._documents(source, Counts())
            if source.read == before.read:
                return
            seed = 1_000_003 * (1_000_003 * self.seed + place.epoch) + before.read
            rows = self.arranged(list(map(len, documents)), seed)
            for number, row in enumerate(rows[done:], start=done + 1):
                behind = Place(before.epoch, number, before.read, before.digest)
                yield (
                    source.place(place.epoch) if number == len(rows) else behind,
                    [documents[document] for document in row],
                )
            done = 0

    def first(self, counts: Counts) -> list[Document]:
        """The documents of the first window, counted."""
        return self._documents(self._source(counts.skipped), counts)

    def _source(self, skipped: list[DataError]) -> _Watched:
        return _Watched(self.data, skipped if self.data.bad_rows == "skip" else None)

    def _documents(self, source: _Watched, counts: Counts) -> list[Document]:
        window = list(itertools.islice(source, self.data.window))
        counts.rows += len(window)
        found = self.encoder.encode(self.data, source.skipped, window)
        return [piece for document in found for piece in fitted(document, self.data, counts)]


class _Watched:
    """The rows of a source, which are counted and digested as they are read."""

    def __init__(self, data: DataSpec, skipped: list[DataError] | None) -> None:
        self._source = data.source
        self._rows = read_rows(data, None if skipped is None else skipped.append)
        self.skipped = skipped
        self._digest = hashlib.sha256()
        self.read = 0

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        row = next(self._rows)
        self._digest.update(json.dumps(row.values, default=str).encode())
        self.read += 1
        return row

    def place(self, epoch: int) -> Place:
        """Where the next window begins."""
        return Place(epoch, read=self.read, digest=self._digest.hexdigest() if self.read else "")

    def skip_to(self, place: Place) -> None:
        """Read what is before a place."""
        for _ in itertools.islice(self, place.read):
            pass
        if self.place(place.epoch).digest != place.digest:
            raise DataError(
                f"{self._source}: its first {place.read:,} rows are not those that were trained on before",
                fix="the data as they were, or a run in a new folder",
                row=None,
            )
