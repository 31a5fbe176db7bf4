"""The documents that a run trains on and holds out, counted."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import attrs

from qwenft.data.cache import tokenised
from qwenft.data.fitting import Counts, fitted
from qwenft.data.iterable import IterableStream
from qwenft.data.stream import MapStream, Stream
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
        report: what was counted: of streamed data, their first window.
        digests: of each file, what it gave to either part: equal ones are trained on alike.
    """

    train: Stream
    held_out: MapStream | None
    report: DataReport
    digests: dict[str, str]


_STEPS = 16  # of the histogram of lengths


def read_corpus(
    data: DataSpec, training: TrainingSpec, encoder: ChatEncoder, *, rank: int = 0, ranks: int = 1
) -> Corpus:
    """Tokenise a source, apply its length policy, hold some out, and count; of streamed data the first window.

    Args:
        data: what is read.
        training: the steps.
        encoder: of the checkpoint.
        rank: of the process whose micro-batches are made.
        ranks: how many processes share a step.

    Raises:
        DataError: a row is wrong, too long under the policy "error", or no token of the data is trained; or there
            are fewer documents than processes.
    """
    counts = Counts()
    options = _options(data, training) | _reading(data, encoder) | {"rank": rank, "ranks": ranks}
    streamed = None if data.window is None else IterableStream(data, encoder, **options)
    documents = _fitting(data, encoder, counts) if streamed is None else streamed.first(counts)
    _require_supervision(documents, data, "data")
    held_out: list[Document] = []
    if isinstance(data.held_out, DataSpec):
        others = Counts()
        held_out = _fitting(data.held_out, encoder, others)
        counts.skipped = [*counts.skipped, *others.skipped]
        _require_supervision(held_out, data.held_out, "held-out data")
    elif data.held_out is not None:
        documents, held_out = _split(documents, data.held_out, training.seed)
    _require_shared(documents, ranks)
    train = MapStream(documents, **options)
    rows = train.rows()
    steps = [train.step_count(epoch) for epoch in range(training.epochs or 1)]
    tokens = sum(train.lengths)
    taken = sum(train.lengths[document] for row in rows for document in row)
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
        fill=taken / (len(rows) * data.capacity),
        steps_per_epoch=steps[0],
        # Epochs see other rows, and may need a step more or less.
        steps=training.max_steps or sum(steps),
        window=data.window,
        **_seen(documents),
        held_out=len(held_out),
        held_out_supervised=sum(document.supervised for document in held_out),
    )
    _require_reached(report.steps, training)
    other = data.held_out if isinstance(data.held_out, DataSpec) else data
    options = _options(other, training) | _reading(other, encoder) | {"rank": rank, "ranks": ranks}
    evaluated = MapStream(held_out, **options) if held_out else None
    # Of a stream only its beginning is known; its places tell what was read since.
    digests = {**_digests(documents, ""), **_digests(held_out, "held out, ")}
    return Corpus(streamed or train, evaluated, report, digests)


def _seen(documents: list[Document]) -> dict[str, int]:
    """How many images and videos, and how many tokens these are."""
    media = [medium for document in documents for medium in document.media]
    kinds = [medium.kind for medium in media]
    return {
        "images": kinds.count("image"),
        "videos": kinds.count("video"),
        "vision_tokens": sum(len(medium.starts) * medium.frame_tokens for medium in media),
    }


def _histogram(lengths: list[int]) -> tuple[tuple[int, int], ...]:
    width = max(1, -(-max(lengths) // _STEPS))
    found = Counter((length - 1) // width for length in lengths)
    return tuple(((step + 1) * width, found[step]) for step in range(max(found) + 1))


def _options(data: DataSpec, training: TrainingSpec) -> dict[str, Any]:
    return {
        "capacity": data.capacity,
        "packed": data.packed,
        "tokens_per_step": training.tokens_per_step,
        "seed": training.seed,
    }


def _reading(data: DataSpec, encoder: ChatEncoder) -> dict[str, Any]:
    """How pixels are read; workers only where images or videos can be."""
    pixels = None if encoder.media is None else encoder.media.pixels
    return {"pixels": pixels, "workers": data.images.workers}


def _fitting(data: DataSpec, encoder: ChatEncoder, counts: Counts) -> list[Document]:
    """The documents of all parts that are trained on, after the length policy; the others are counted."""
    documents = []
    for part, times in data.parts:
        read = tokenised(part, encoder)
        counts.skipped += read.skipped
        counts.cache = "; ".join(filter(None, (counts.cache, read.cache)))
        counts.rows += len(read.documents) + len(read.skipped)
        for document in read.documents:
            pieces = fitted(document, part, counts)
            documents += pieces if times == 1 else [attrs.evolve(piece, times=times) for piece in pieces]
    return documents


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
        where = ", ".join(data.source) if isinstance(data.source, tuple) else data.source
        raise DataError(
            f"no token of the {what} is trained ({where}): every row is too long or has no assistant turn",
            fix="conversations with assistant turns, or a larger .with_max_length(n)",
            file=None,
            row=None,
        )


def _require_shared(documents: list[Document], ranks: int) -> None:
    if len(documents) < ranks:
        raise DataError(
            f"{len(documents)} documents cannot be shared out over {ranks} processes",
            fix=f"{len(documents)} processes at the most, or more data",
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
            for medium in document.media:
                for picture in medium.pictures:
                    digest.update(picture.fingerprint)
        tokens = sum(map(len, of_file))
        digests[f"{part}{file}"] = f"{len(of_file):,} documents, {tokens:,} tokens, sha256 {digest.hexdigest()}"
    return digests
