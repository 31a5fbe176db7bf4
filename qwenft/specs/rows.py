"""Where rows come from: files, memory, a data set object, or the hub."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs

from qwenft.errors import SpecError


class Rows:
    """Rows in memory, compared and hashed by their content as JSON lines.

    A list is copied at once, so that changing it later changes no spec; an object that promises not to change
    (a ``datasets.Dataset``) is kept as it is and read when needed.

    Args:
        rows: a list or tuple of mappings, or anything with ``__len__`` and ``__iter__`` that gives mappings.
        name: what errors call them.

    Raises:
        SpecError: a row is no mapping, or holds what JSON cannot.
    """

    def __init__(self, rows: Any, name: str = "rows in memory") -> None:
        self._name = name
        copied = isinstance(rows, list | tuple)
        self._lines: tuple[str, ...] | None = tuple(_lines(rows)) if copied else None
        self._rows: Any = None if copied else rows
        self._digest: str | None = None

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        if self._lines is not None:
            return (json.loads(line) for line in self._lines)
        return (without_none(row) for row in self._rows)

    def __len__(self) -> int:
        return len(self._rows if self._lines is None else self._lines)

    def lines(self) -> Iterator[str]:
        """Each row as one line of JSON."""
        return iter(self._lines) if self._lines is not None else _lines(self)

    @property
    def digest(self) -> str:
        """sha256 of the lines."""
        if self._digest is None:
            state = hashlib.sha256()
            for line in self.lines():
                state.update(line.encode() + b"\n")
            self._digest = state.hexdigest()
        return self._digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and len(self) == len(other) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"<{len(self)} rows in memory>"

    def __str__(self) -> str:
        return self._name


@attrs.frozen
class HubRows:
    """Rows of a data set on the hub, or in a folder that ``datasets.load_dataset`` reads.

    Args:
        name: its id or folder.
        split: such as "train" or "train[:1000]".
        revision: a branch, tag or commit; the newest where None.
    """

    name: str
    split: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name}, {self.split}{f' at {self.revision}' if self.revision else ''}"


@attrs.frozen(eq=False)
class IteratedRows:
    """Rows that can only be gone through, such as a ``datasets.IterableDataset``; equal to itself alone.

    Args:
        rows: gives the same mappings each time that it is iterated.
    """

    rows: Iterable[Mapping[str, Any]]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (without_none(row) for row in self.rows)

    def __str__(self) -> str:
        return f"rows of {type(self.rows).__name__}"


Source = tuple[str, ...] | Rows | HubRows | IteratedRows


def source_of(value: Any) -> Source:
    """Files as a tuple of paths, or rows."""
    if isinstance(value, Rows | HubRows | IteratedRows):
        return value
    if isinstance(value, str | os.PathLike):
        return (os.fspath(value),)
    if isinstance(value, list | tuple) and value and all(isinstance(v, str | os.PathLike) for v in value):
        return tuple(os.fspath(path) for path in value)
    if isinstance(value, list | tuple) or is_dataset(value):
        return Rows(value)
    if is_iterable_dataset(value):
        return IteratedRows(value)
    raise SpecError(
        f"DataSpec.source: expected a file, a list of them, a list of dicts or a data set, got {value!r}",
        fix='DataSpec.messages("chats.jsonl")',
        field="source",
        got=value,
    )


def hub_source(source: Any, split: str | None, revision: str | None) -> Any:
    """A source, which is a data set's name where a split or a revision is given."""
    if split is None and revision is None:
        return source
    if not isinstance(source, str | os.PathLike) or not isinstance(split, str):
        raise SpecError(
            f"split={split!r}, revision={revision!r}: expected the name of a data set and of a split, "
            f"got {source!r}",
            fix='DataSpec.messages("organisation/name", split="train")',
            field="source",
            got=source,
        )
    return HubRows(os.fspath(source), split, revision)


def is_dataset(value: Any) -> bool:
    """Whether ``value`` is a sized, indexable collection of rows, such as a ``datasets.Dataset``."""
    return is_iterable_dataset(value) and hasattr(value, "__len__")


def is_iterable_dataset(value: Any) -> bool:
    """Whether ``value`` is a data set object, sized or not."""
    return hasattr(value, "column_names") and hasattr(value, "__iter__")


def without_none(value: Any) -> Any:
    """``value`` without the None that columnar data hold for absent keys, and templates take for present ones."""
    if isinstance(value, Mapping):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [without_none(inner) for inner in value]
    return value


def _data_url(value: Any) -> str:
    """An image, or the bytes of one, as JSON holds it."""
    if hasattr(value, "getexif") and hasattr(value, "save"):
        encoded = io.BytesIO()
        value.save(encoded, format="PNG")
        value = encoded.getvalue()
    if isinstance(value, bytes | bytearray):
        import base64

        return f"data:image/*;base64,{base64.b64encode(value).decode()}"
    msg = f"Object of type {type(value).__name__} is not JSON serializable"
    raise TypeError(msg)


def _lines(rows: Iterable[Any]) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise SpecError(
                f"DataSpec: expected every row to be a mapping, got {type(row).__name__} in row {number}",
                fix='DataSpec.messages([{"messages": [{"role": "user", "content": "..."}, ...]}])',
                got=row,
                row=number,
            )
        try:
            # In the row's own order, which templates show.
            line = json.dumps(dict(row), ensure_ascii=False, default=_data_url)
            line.encode()
        except (TypeError, ValueError) as error:
            raise SpecError(
                f"DataSpec: row {number} holds what JSON cannot: {error}",
                fix="rows of strings, numbers, lists, mappings and images",
                row=number,
            ) from None
        yield line
