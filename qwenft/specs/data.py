"""Which conversations are trained on, and how they meet the model."""

from __future__ import annotations

import os
from typing import Any

import attrs

from qwenft.errors import SpecError
from qwenft.specs.base import Check, flag, one_of, spec, text, whole
from qwenft.specs.rows import Rows, is_dataset

FORMATS = ("messages",)
OVERFLOWS = ("drop", "truncate", "error")


def _source(value: Any) -> tuple[str, ...] | Rows:
    """Files as a tuple of paths, or rows in memory."""
    if isinstance(value, Rows):
        return value
    if isinstance(value, str | os.PathLike):
        return (os.fspath(value),)
    if isinstance(value, list | tuple) and value and all(isinstance(v, str | os.PathLike) for v in value):
        return tuple(os.fspath(path) for path in value)
    if isinstance(value, list | tuple) or is_dataset(value):
        return Rows(value)
    raise SpecError(
        f"DataSpec.source: expected a JSONL file, a list of them, a list of dicts or a Dataset, got {value!r}",
        fix='DataSpec.messages("chats.jsonl")',
        field="source",
        got=value,
    )


def _is_holdout(value: Any) -> bool:
    if value is None or isinstance(value, DataSpec):
        return True
    return isinstance(value, float) and 0.0 < value < 1.0


@spec
@attrs.frozen
class DataSpec:
    """Conversations from files or memory. Write it with :meth:`messages`.

    Args:
        format: how a row says a conversation: "messages", a list of {"role", "content"}.
        source: paths of JSONL files, or rows in memory.
        column: the column that holds the conversation.
        max_length: the longest document, in tokens.
        overflow: what happens to a longer one: "drop" it, "truncate" its end, or stop with an "error".
        packed: several documents share a row of the stream; they never see each other.
        row_tokens: the capacity of a packed row; ``max_length`` where None.
        held_out: a fraction of the rows, or other data with their own lengths and packing, kept for evaluation.

    Examples:
        >>> DataSpec.messages("chats.jsonl").with_max_length(1024).pack().packed
        True
    """

    format: str = attrs.field(kw_only=True, validator=one_of(FORMATS, 'DataSpec.messages("chats.jsonl")'))
    source: tuple[str, ...] | Rows = attrs.field(kw_only=True, converter=_source)
    column: str = attrs.field(
        default="messages", kw_only=True, validator=text('.with_columns(messages="conversation")')
    )
    max_length: int = attrs.field(default=2048, kw_only=True, validator=whole(".with_max_length(2048)", low=2))
    overflow: str = attrs.field(
        default="drop", kw_only=True, validator=one_of(OVERFLOWS, '.with_max_length(2048, overflow="drop")')
    )
    packed: bool = attrs.field(default=False, kw_only=True, validator=flag(".pack()"))
    row_tokens: int | None = attrs.field(
        default=None, kw_only=True, validator=whole(".pack(row_tokens=8192)", low=2, optional=True)
    )
    held_out: float | DataSpec | None = attrs.field(
        default=None,
        kw_only=True,
        validator=Check(_is_holdout, "a fraction above 0 and below 1, or a DataSpec", ".hold_out(0.05)"),
    )

    @classmethod
    def messages(cls, source: Any) -> DataSpec:
        """Rows whose ``messages`` column is a list of {"role": ..., "content": ...}.

        Args:
            source: a JSONL file, a list of them, a list of dicts, or a ``datasets.Dataset``.
        """
        return cls(format="messages", source=source)

    def with_columns(self, *, messages: str) -> DataSpec:
        """Read the conversation from the column named ``messages``."""
        return attrs.evolve(self, column=messages)

    def with_max_length(self, tokens: int, overflow: str = "drop") -> DataSpec:
        """Say how long a document may be, and what happens to a longer one."""
        return attrs.evolve(self, max_length=tokens, overflow=overflow)

    def pack(self, row_tokens: int | None = None) -> DataSpec:
        """Put several documents into rows of ``row_tokens`` tokens, or of max_length where None."""
        return attrs.evolve(self, packed=True, row_tokens=row_tokens)

    def unpack(self) -> DataSpec:
        """Give each document a row of its own."""
        return attrs.evolve(self, packed=False, row_tokens=None)

    def hold_out(self, data: float | DataSpec) -> DataSpec:
        """Keep a fraction of the rows, or other data, for evaluation."""
        return attrs.evolve(self, held_out=data)

    @property
    def capacity(self) -> int:
        """The most tokens in a row of the stream."""
        return (self.row_tokens or self.max_length) if self.packed else self.max_length
