"""Pixels that are read ahead of training, by worker processes, a bounded number of rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from qwenft.data.pictures import PictureError
from qwenft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy as np

    from qwenft.data.document import Document
    from qwenft.data.media import Medium

_ROWS_AHEAD = 2  # of each worker


class _Pixels(Dataset):
    """The pixels of rows, by what the rows hold: in a worker's process an error has no way back but as a value."""

    def __init__(self, pixels: Callable[[Medium], np.ndarray]) -> None:
        self._pixels = pixels

    def __getitem__(self, row: list[tuple[str, int, tuple[Medium, ...]]]) -> list[torch.Tensor] | dict[str, Any]:
        found = []
        for file, number, media in row:
            for place, medium in enumerate(media, start=1):
                try:
                    found.append(torch.from_numpy(self._pixels(medium)))
                except PictureError as error:
                    problem = f"{file}, row {number}: image {place}: {error}"
                    return {"problem": problem, "fix": error.fix, "file": file, "row": number}
        return found


def read_ahead(
    rows: Iterable[Sequence[Document]], pixels: Callable[[Medium], np.ndarray], workers: int
) -> Iterator[list[torch.Tensor]]:
    """Of each row the pixels of all its media, in their order.

    Args:
        rows: of documents.
        pixels: reads a medium.
        workers: processes that read; none of them where 0.

    Raises:
        DataError: an image is broken, or has changed since it was measured.
    """
    named = ([(one.file, one.row, one.media) for one in row] for row in rows)
    # A generator of its own: a loader draws a seed as it begins, and a run that goes on has to draw as it did.
    options: dict[str, Any] = {"generator": torch.Generator()}
    if workers:
        options |= {"num_workers": workers, "prefetch_factor": _ROWS_AHEAD}
    loader = DataLoader(_Pixels(pixels), batch_size=None, sampler=_Once(named), collate_fn=_as_it_is, **options)
    for found in loader:
        if isinstance(found, dict):
            raise DataError(found["problem"], fix=found["fix"], file=found["file"], row=found["row"])
        yield found


class _Once:
    """What a DataLoader takes for a sampler: rows that are gone through as they are needed."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)


def _as_it_is(value: Any) -> Any:
    return value
