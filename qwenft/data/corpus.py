"""The documents that a run trains on and holds out, counted."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from typing import TYPE_CHECKING

import attrs

from qwenft.data.cache import tokenised
from qwenft.data.stream import Stream
from qwenft.errors import DataError
from qwenft.plan.records import DataReport
from qwenft.specs.data import DataSpec

if TYPE_CHECKING:
    from qwenft.data.chat import ChatEncoder
    from qwenft.data.document import Document
    from qwenft.specs.training import TrainingSpec


@attrs.frozen(eq=False)
class Corpus:
    """What a run reads.

    Args:
        train: the rows and steps of training.
        held_out: the rows of evaluation, or None.
        report: what was counted.
        digests: of each file, what it gave to either part: equal ones are trained on alike.
    """

    train: Stream
    held_out: Stream | None
    report: DataReport
    digests: dict[str, str]


_STEPS = 16  # of the histogram of lengths


@attrs.define
class _Counts:
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


def read_corpus(data: DataSpec, training: TrainingSpec, encoder: ChatEncoder) -> Corpus:
    """Tokenise a source, apply its length policy, hold some out, and count.

    Raises:
        DataError: a row is wrong, too long under the policy "error", or no token of the data is trained.
    """
    counts = _Counts()
    documents = _fitting(data, encoder, counts)
    _require_supervision(documents, data, "data")
    held_out: list[Document] = []
    if isinstance(data.held_out, DataSpec):
        others = _Counts()
        held_out = _fitting(data.held_out, encoder, others)
        counts.skipped = [*counts.skipped, *others.skipped]
        _require_supervision(held_out, data.held_out, "held-out data")
    elif data.held_out is not None:
        documents, held_out = _split(documents, data.held_out, training.seed)
    train = _stream(documents, data, training)
    rows = train.rows()
    tokens = sum(train.lengths)
    report = DataReport(
        rows=counts.rows,
        documents=len(documents),
        tokens=tokens,
        supervised=sum(document.supervised for document in documents),
        longest=max(train.lengths),
        dropped=counts.dropped,
        truncated=counts.truncated,
        split=counts.split,
        untrained=counts.untrained,
        lost=tuple(sorted(counts.lost.items())),
        skipped=tuple(str(error) for error in counts.skipped),
        read_tokens=sum(counts.lengths),
        lost_tokens=sum(counts.lengths) - counts.kept_tokens,
        lengths=_histogram(counts.lengths),
        cache=counts.cache,
        stream_rows=len(rows),
        fill=tokens / (len(rows) * data.capacity),
        steps_per_epoch=train.step_count(),
        # Epochs see other rows, and may need a step more or less.
        steps=training.max_steps or sum(train.step_count(epoch) for epoch in range(training.epochs or 1)),
        held_out=len(held_out),
        held_out_supervised=sum(document.supervised for document in held_out),
    )
    _require_reached(report.steps, training)
    other = data.held_out if isinstance(data.held_out, DataSpec) else data
    digests = {**_digests(documents, ""), **_digests(held_out, "held out, ")}
    return Corpus(train, _stream(held_out, other, training) if held_out else None, report, digests)


def _histogram(lengths: list[int]) -> tuple[tuple[int, int], ...]:
    width = max(1, -(-max(lengths) // _STEPS))
    found = Counter((length - 1) // width for length in lengths)
    return tuple(((step + 1) * width, found[step]) for step in range(max(found) + 1))


def _stream(documents: list[Document], data: DataSpec, training: TrainingSpec) -> Stream:
    return Stream(
        documents,
        capacity=data.capacity,
        packed=data.packed,
        tokens_per_step=training.tokens_per_step,
        seed=training.seed,
    )


def _fitting(data: DataSpec, encoder: ChatEncoder, counts: _Counts) -> list[Document]:
    """The documents that are trained on, after the length policy; the others are counted."""
    documents = []
    read = tokenised(data, encoder)
    counts.skipped, counts.cache = read.skipped, read.cache
    for document in read.documents:
        counts.rows += 1
        counts.lost.update(document.lost)
        pieces = [document] if len(document) <= data.max_length else _shortened(document, data, counts)
        trained = [piece for piece in pieces if piece.supervised]
        counts.untrained += bool(pieces) and not trained
        documents += trained
        counts.lengths.append(len(document))
        # What pieces repeat as context is not lost, nor is it kept twice.
        counts.kept_tokens += min(sum(map(len, trained)), len(document))
    counts.rows += len(counts.skipped)
    return documents


def _shortened(document: Document, data: DataSpec, counts: _Counts) -> list[Document]:
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


def _split(documents: list[Document], fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Documents to train on and to hold out, at least one each, the same for the same seed."""
    if len(documents) < 2:
        raise DataError(
            f"hold_out({fraction}): {len(documents)} documents cannot be shared out",
            fix="more data",
            file=None,
            row=None,
        )
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    count = min(max(1, round(fraction * len(documents))), len(documents) - 1)
    held = set(order[:count])
    return (
        [document for index, document in enumerate(documents) if index not in held],
        [document for index, document in enumerate(documents) if index in held],
    )


def _require_supervision(documents: list[Document], data: DataSpec, what: str) -> None:
    if not documents:
        where = data.source if isinstance(data.source, tuple) else "rows in memory"
        raise DataError(
            f"no token of the {what} is trained ({where}): every row is too long or has no assistant turn",
            fix="conversations with assistant turns, or a larger .with_max_length(n)",
            file=None,
            row=None,
        )


def _require_reached(steps: int, training: TrainingSpec) -> None:
    """Refuse what the run would end before."""
    every = training.evaluate_every
    if every is not None and every > steps:
        raise DataError(
            f"training.evaluate_every: the run has {steps:,} steps, and step {every:,} is never reached",
            fix=f"TrainingSpec(evaluate_every={steps}), more data, or more epochs",
            file=None,
            row=None,
        )
    if every is not None and training.patience is not None and training.patience >= -(-steps // every):
        raise DataError(
            f"training.patience: {steps:,} steps are evaluated {-(-steps // every)} times, "
            f"and a patience of {training.patience} never ends before",
            fix="a smaller patience or evaluate_every",
            file=None,
            row=None,
        )


def _digests(documents: list[Document], part: str) -> dict[str, str]:
    """By file: how many documents and tokens of it are used, and a sha256 of them and their order."""
    by_file: dict[str, list[Document]] = {}
    for document in documents:
        by_file.setdefault(document.file, []).append(document)
    digests = {}
    for file, of_file in by_file.items():
        digest = hashlib.sha256()
        for document in of_file:
            digest.update(document.row.to_bytes(8, "little"))
            digest.update(document.input_ids.tobytes())
            digest.update(document.labels.tobytes())
            if document.weights is not None:
                digest.update(document.weights.tobytes())
        tokens = sum(map(len, of_file))
        digests[f"{part}{file}"] = f"{len(of_file):,} documents, {tokens:,} tokens, sha256 {digest.hexdigest()}"
    return digests
