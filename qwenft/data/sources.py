"""Rows of files and of memory, each with the place it came from."""

from __future__ import annotations

import csv
import glob
import itertools
import json
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from qwenft.data.formats import EXAMPLE, conversation
from qwenft.errors import DataError
from qwenft.specs.rows import HubRows, IteratedRows, Rows, without_none

if TYPE_CHECKING:
    from qwenft.specs.data import DataSpec

_ROWS_AT_ONCE = 1024  # of a Parquet file, decoded together


@attrs.frozen
class Row:
    """One row of a source.

    Args:
        values: its columns.
        file: the path, "rows in memory", or the name of a data set.
        number: the line of a JSONL or CSV file, else the place among the rows, counted from 1.
    """

    values: Mapping[str, Any]
    file: str
    number: int

    def error(self, problem: str, fix: str | None = None) -> DataError:
        """A DataError that names this row."""
        return DataError(f"{self.file}, row {self.number}: {problem}", fix=fix, file=self.file, row=self.number)


BadRow = Callable[[DataError], None]


def read_rows(data: DataSpec, on_bad_row: BadRow | None = None) -> Iterator[Row]:
    """The rows of a source, in its order; a glob's files in that of their names.

    Args:
        data: with the source.
        on_bad_row: called with the error of a row that cannot be read, which is left out; raised where None.

    Raises:
        DataError: a file is missing, changes while it is read or holds no row, or a row is no mapping; the error
            names file and row.
    """
    source = resolved(data).source
    if isinstance(source, tuple):
        for path in files_of(data):
            yield from _file_rows(path, on_bad_row or _raise)
        return
    rows = IteratedRows(_hub_rows(source, streamed=True)) if isinstance(source, HubRows) else source
    found = False
    for number, values in enumerate(_iterated(rows, str(source)), start=1):
        found = True
        row = Row(values, str(source), number)
        if isinstance(values, Mapping):
            yield row
        else:
            (on_bad_row or _raise)(row.error(f"expected a mapping, got {type(values).__name__}", EXAMPLE))
    if not found:
        raise DataError(f"{source}: there is no row", fix=f"DataSpec.messages([{EXAMPLE}])", file=None, row=None)


def resolved(data: DataSpec) -> DataSpec:
    """The data with their source at hand: what lies on the hub is downloaded, unless it is streamed.

    Raises:
        DataError: there is no such data set, split or revision, or it cannot be reached.
    """
    if isinstance(data.source, HubRows) and data.window is None:
        return attrs.evolve(data, source=Rows(_hub_rows(data.source, streamed=False), str(data.source)))
    return data


def _hub_rows(source: HubRows, *, streamed: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source.name, split=source.split, revision=source.revision, streaming=streamed)
    except Exception as error:  # datasets raises errors of many libraries
        raise DataError(
            f"{source}: cannot be loaded: {type(error).__name__}: {error}",
            fix='the id of a data set that you may read, and a split of it: ("organisation/name", split="train")',
            file=str(source),
            row=None,
        ) from error


def files_of(data: DataSpec) -> list[Path]:
    """The files of a source, in its order; none for rows and data sets.

    Raises:
        DataError: one is missing or no regular file.
    """
    if not isinstance(data.source, tuple):
        return []
    files = [path for pattern in data.source for path in _paths(pattern)]
    for path in files:
        signature(path)
    return files


def signature(path: Path) -> tuple[int, int, int]:
    """What changes when a file does: time, size and inode.

    Raises:
        DataError: it is missing or no regular file.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise _unreadable(path, "is no regular file")  # a FIFO would wait for its writer
    return found.st_mtime_ns, found.st_size, found.st_ino


def check_head(data: DataSpec, rows: int = 5) -> None:
    """Read the first rows of every source and check their conversations.

    Raises:
        DataError: what would be wrong with them in training.
    """
    for part, _ in data.parts:
        skips = part.bad_rows == "skip"
        sources: list[Any] = [part.source]
        if isinstance(part.source, tuple):
            sources = [(path,) for path in part.source]
        elif isinstance(part.source, HubRows):
            # Streamed, so that no data set is downloaded for its head: whole splits can be, not slices of them.
            sources = [attrs.evolve(part.source, split=re.split(r"[\[+]", part.source.split)[0])]
        for source in sources:
            head = read_rows(attrs.evolve(part, source=source, window=rows), _ignore if skips else None)
            for row in itertools.islice(head, rows):
                if not skips:
                    conversation(row, part)


def _raise(error: DataError) -> None:
    raise error


def _ignore(_: DataError) -> None:
    """Leave a row out."""


def _paths(pattern: str) -> list[Path]:
    """The file of this name, or else those that a glob matches."""
    if not glob.has_magic(pattern) or glob.glob(glob.escape(pattern)):  # noqa: PTH207 - as below
        return [Path(pattern)]
    paths = sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207 - a pattern may be absolute
    if not paths:
        raise _unreadable(Path(pattern), "no file matches")
    return paths


def _iterated(rows: Any, name: str) -> Iterator[Any]:
    """The rows, and where they cannot be reached any more an error that names them."""
    try:
        yield from rows
    except OSError as error:
        raise DataError(
            f"{name}: cannot be read: {error}", fix="a data set that can be read", file=None, row=None
        ) from error


def _file_rows(path: Path, on_bad_row: BadRow) -> Iterator[Row]:
    before = signature(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise _unreadable(path, f"expected a name that ends in {', '.join(_READERS)}")
    found = False
    try:
        for row in read(path, on_bad_row):
            found = True
            yield row
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {error.strerror or error}") from None
    if signature(path) != before:
        raise _unreadable(path, "changed while it was read", "start again when it is written")
    if not found:
        raise _unreadable(path, "holds no row", f"one conversation a line: {EXAMPLE}")


def _unreadable(path: Path, problem: str, fix: str = "a JSONL, JSON, Parquet or CSV file") -> DataError:
    return DataError(f"{path}: {problem}", fix=fix, file=str(path), row=None)


def _json_lines(path: Path, on_bad_row: BadRow) -> Iterator[Row]:
    with path.open("rb") as lines:  # decoded line by line, so that an error names its own
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    values = _object(path, number, line)
                except DataError as error:
                    on_bad_row(error)
                else:
                    yield Row(values, str(path), number)


def _object(path: Path, number: int, line: bytes) -> Mapping[str, Any]:
    def wrong(problem: str, fix: str = f"one JSON object a line: {EXAMPLE}") -> DataError:
        return DataError(f"{path}, line {number}: {problem}", fix=fix, file=str(path), row=number)

    try:
        values = _parsed(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise wrong(f"is no UTF-8: {error}", "a JSONL file in UTF-8, one conversation a line") from None
    except json.JSONDecodeError as error:
        raise wrong(f"broken JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise wrong("is nested too deeply") from None
    except ValueError as error:
        raise wrong(str(error)) from None
    if not isinstance(values, dict):
        raise wrong(f"expected a JSON object, got {type(values).__name__}")
    return values


def _parsed(text: str) -> Any:
    """The value of a JSON text in which no key stands twice: of two, a parser would silently keep the last."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            msg = f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in one object"
            raise ValueError(msg)
        return values

    return json.loads(text, object_pairs_hook=once)


def _json_file(path: Path, on_bad_row: BadRow) -> Iterator[Row]:
    """A list of rows, or an object with one list of rows in it."""
    try:
        rows = _parsed(path.read_bytes().decode("utf-8-sig"))
    except RecursionError:
        raise _unreadable(path, "is nested too deeply") from None
    except ValueError as error:
        raise _unreadable(path, f"broken JSON: {error}") from None
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else rows
    if not isinstance(rows, list):
        raise _unreadable(path, f"expected a list of rows, got {type(rows).__name__}", f"[{EXAMPLE}]")
    for number, values in enumerate(rows, start=1):
        row = Row(values, str(path), number)
        if isinstance(values, dict):
            yield row
        else:
            on_bad_row(row.error(f"expected a JSON object, got {type(values).__name__}", EXAMPLE))


def _parquet(path: Path, _: BadRow) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(without_none(values), str(path), number)
    except (pa.ArrowException, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise _unreadable(path, f"is no whole Parquet file, behind row {number}: {error}") from None


def _csv(path: Path, on_bad_row: BadRow) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            for values in reader:
                row = Row(values, str(path), reader.line_num)
                if None in values or None in values.values():
                    expected = len(reader.fieldnames or ())
                    on_bad_row(row.error(f"expected {expected} columns as in the first line", "quote the commas"))
                else:
                    yield row
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"is no UTF-8: {error}") from None
    except csv.Error as error:
        raise _unreadable(path, f"broken CSV: {error}") from None


_READERS: dict[str, Callable[[Path, BadRow], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_file,
    ".parquet": _parquet,
    ".csv": _csv,
}
