"""Rows of conversations, each with the place it came from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from qwenft.errors import DataError
from qwenft.specs.rows import Rows

if TYPE_CHECKING:
    from qwenft.specs.data import DataSpec

ROLES = ("system", "user", "assistant", "tool")
_EXAMPLE = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}'


@attrs.frozen
class Row:
    """One row of a source.

    Args:
        values: its columns.
        file: the path, or "rows in memory".
        number: the line of the file, or the place in memory, counted from 1.
    """

    values: Mapping[str, Any]
    file: str
    number: int

    def error(self, problem: str, fix: str | None = None) -> DataError:
        """A DataError that names this row."""
        return DataError(f"{self.file}, row {self.number}: {problem}", fix=fix, file=self.file, row=self.number)


def read_rows(data: DataSpec) -> Iterator[Row]:
    """The rows of a source, in its order.

    Raises:
        DataError: a file is missing or holds no row, or a line is no JSON object; the error names file and line.
    """
    if isinstance(data.source, Rows):
        yield from _memory_rows(data.source)
        return
    for path in data.source:
        yield from _file_rows(Path(path))


def check_head(data: DataSpec, rows: int = 5) -> None:
    """Read the first rows of every source and check their conversations.

    Raises:
        DataError: what would be wrong with them in training.
    """
    sources = [data.source] if isinstance(data.source, Rows) else [(path,) for path in data.source]
    for source in sources:
        for row in itertools.islice(read_rows(attrs.evolve(data, source=source)), rows):
            conversation(row, data.column)


def conversation(row: Row, column: str) -> list[dict[str, Any]]:
    """The checked messages of a row.

    Raises:
        DataError: the column is missing, the conversation empty, a role unknown or a content no string.
    """
    if column not in row.values:
        known = ", ".join(map(repr, row.values)) or "none"
        raise row.error(f"expected a column {column!r}, got {known}", '.with_columns(messages="your_column")')
    messages = row.values[column]
    if not isinstance(messages, list | tuple) or not messages:
        got = "an empty conversation" if messages in ([], ()) else f"{type(messages).__name__} {messages!r:.60}"
        raise row.error(f"{column!r}: expected a list of messages, got {got}", _EXAMPLE)
    return [_message(row, column, place, message) for place, message in enumerate(messages)]


def _message(row: Row, column: str, place: int, message: Any) -> dict[str, Any]:
    where = f"{column}[{place}]"
    if not isinstance(message, Mapping):
        raise row.error(f"{where}: expected a mapping with role and content, got {message!r:.60}", _EXAMPLE)
    role = message.get("role")
    if role not in ROLES:
        raise row.error(f"{where}: expected a role of {', '.join(ROLES)}, got {role!r}", _EXAMPLE)
    content = message.get("content")
    calls_only = role == "assistant" and content is None and message.get("tool_calls")
    if not isinstance(content, str) and not calls_only:
        raise row.error(f"{where}.content: expected a string, got {content!r:.60}", _EXAMPLE)
    # Columnar sources fill absent keys with None, which templates take for present ones.
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _memory_rows(rows: Rows) -> Iterator[Row]:
    if len(rows) == 0:
        raise DataError(
            "rows in memory: there is none", fix=f"DataSpec.messages([{_EXAMPLE}])", file=None, row=None
        )
    for number, values in enumerate(rows, start=1):
        yield Row(values, "rows in memory", number)


def _file_rows(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with path.open("rb") as lines:  # decoded line by line, so that an error names its own
            for line_number, line in enumerate(lines, start=1):
                if line.strip():
                    number += 1
                    yield Row(_object(path, line_number, line), str(path), line_number)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}",
            fix="a JSONL file in UTF-8, one conversation a line",
            file=str(path),
            row=None,
        ) from None
    if number == 0:
        raise DataError(
            f"{path}: holds no row", fix=f"one conversation a line: {_EXAMPLE}", file=str(path), row=None
        )


def _object(path: Path, number: int, line: bytes) -> Mapping[str, Any]:
    try:
        values = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: is no UTF-8: {error}",
            fix="a JSONL file in UTF-8, one conversation a line",
            file=str(path),
            row=number,
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {number}: broken JSON at column {error.colno}: {error.msg}",
            fix=f"one JSON object a line: {_EXAMPLE}",
            file=str(path),
            row=number,
        ) from None
    if not isinstance(values, dict):
        raise DataError(
            f"{path}, line {number}: expected a JSON object, got {type(values).__name__}",
            fix=f"one JSON object a line: {_EXAMPLE}",
            file=str(path),
            row=number,
        )
    return values
