"""What the length policy leaves of documents, counted."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import attrs

from qwenft.errors import DataError

if TYPE_CHECKING:
    from qwenft.data.document import Document
    from qwenft.specs.data import DataSpec


@attrs.define
class Counts:
    """What became of the rows; see :class:`qwenft.plan.records.DataReport`, whose numbers these become."""

    rows: int = 0
    dropped: int = 0
    truncated: int = 0
    split: int = 0
    untrained: int = 0
    lost: Counter[str] = attrs.field(factory=Counter)
    skipped: list[DataError] = attrs.field(factory=list)
    cache: str = ""
    lengths: list[int] = attrs.field(factory=list)
    kept_tokens: int = 0


def fitted(document: Document, data: DataSpec, counts: Counts) -> list[Document]:
    """What the length policy leaves of a document, in pieces that train something; the rest is counted.

    Raises:
        DataError: it is too long under the policy "error".
    """
    counts.lost.update(document.lost)
    pieces = [document] if len(document) <= data.max_length else _shortened(document, data, counts)
    trained = [piece for piece in pieces if piece.supervised]
    counts.untrained += bool(pieces) and not trained
    counts.lengths.append(len(document))
    # What pieces repeat as context is not lost, nor is it kept twice.
    counts.kept_tokens += min(sum(map(len, trained)), len(document))
    return trained


def _shortened(document: Document, data: DataSpec, counts: Counts) -> list[Document]:
    """What the length policy leaves of a document that is too long."""
    if data.overflow == "error":
        raise DataError(
            f"{document.file}, row {document.row}: {len(document):,} tokens are more than "
            f"max_length = {data.max_length:,}",
            fix=f'.with_max_length({len(document)}), or overflow="drop", "truncate" or "split"',
            file=document.file,
            row=document.row,
        )
    if data.overflow == "truncate" and (stop := document.last_end(0, data.max_length)):
        counts.truncated += 1
        return [document.piece(0, stop, trained_from=0)]
    if data.overflow == "split":
        counts.split += 1
        return list(document.split(data.max_length, data.overlap))
    counts.dropped += 1
    return []
