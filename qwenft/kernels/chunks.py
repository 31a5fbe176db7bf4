"""Chunks of all documents of a stream, placed so that documents advance side by side."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import attrs
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from qwenft.kernels.layout import SequenceLayout

CHUNK = 64


@attrs.frozen
class Span:
    """Chunks of one step of the scan: the next chunk of consecutive documents, in the order of the scan.

    Args:
        chunk: the first chunk, counted within its group.
        document: the first document's place in the order of the scan.
        documents: how many.
        going_on: how many of these, the first ones, have another chunk after this one.
        next: where these go on, as a chunk of the same group; None where none does.
        enters: the documents begin here, or their chunks before this one are in an earlier group.
    """

    chunk: int
    document: int
    documents: int
    going_on: int
    next: int | None
    enters: bool

    def rows(self, heads: int, documents: int, first: int = 0) -> slice:
        """The rows of the first ``documents`` chunks in tensors that flatten the group's chunks and heads.

        Args:
            heads: of the tensors.
            documents: how many.
            first: the group's chunk that the tensors begin with.
        """
        return _rows(self.chunk - first, documents, heads)

    def rows_after(self, heads: int, first: int = 0) -> slice | None:
        """The rows of the chunks in the same group that documents go on in; None where there are none."""
        return None if self.next is None else _rows(self.next - first, self.going_on, heads)

    def carried(self, heads: int, documents: int) -> slice:
        """The rows of the same documents in tensors that flatten all documents and heads."""
        return _rows(self.document, documents, heads)


def _rows(first: int, count: int, heads: int) -> slice:
    return slice(first * heads, (first + count) * heads)


@attrs.frozen(eq=False)
class Group:
    """B chunks that are computed together, in consecutive spans.

    Args:
        chunks: B.
        spans: in the order of the scan.
        fresh: how many of these, the first ones, begin their documents.
        stretch: the tokens, where they follow each other in the stream and fill the chunks.
        tokens: [B, 1, C] int64, the token at each place; its last token at a place after a document's end.
        filled: int64, the tokens of the group, in the order of their places.
        places: (chunk, place in it) of these, int64.
        padding: [B, 1, C] bool, the places that hold none.
        heads: by their number H, [H, 1] int64, all of them.
        later: [C, C], minus infinity where the column is later than the row, else 0.
    """

    chunks: int
    spans: tuple[Span, ...]
    fresh: int
    stretch: slice | None
    tokens: Tensor
    filled: Tensor
    places: tuple[Tensor, Tensor]
    padding: Tensor
    heads: Mapping[int, Tensor]
    later: Tensor

    def gather(self, x: Tensor, dtype: torch.dtype, *, zeroed: bool) -> Tensor:
        """Cut this group's tokens out of a stream.

        Args:
            x: [T, heads, ...].
            dtype: of the result.
            zeroed: zero at the places after a document's last token, which else hold that token once more.

        Returns:
            [B, heads, C, ...], contiguous.
        """
        if self.stretch is not None:
            chunks = x[self.stretch].unflatten(0, (-1, CHUNK)).transpose(1, 2)
            return chunks.to(dtype).contiguous()
        chunks = x[self.tokens, self.heads[x.shape[1]]].to(dtype)
        return chunks.masked_fill_(self.padding.view(-1, 1, CHUNK, *(1,) * (x.ndim - 2)), 0) if zeroed else chunks

    def scatter(self, x: Tensor, stream: Tensor) -> None:
        """Write chunks [B, heads, C, ...] into their places of a stream [T, heads, ...]."""
        if self.stretch is not None:
            stream[self.stretch].unflatten(0, (-1, CHUNK)).copy_(x.transpose(1, 2))
        else:
            chunk, place = self.places
            stream.index_copy_(0, self.filled, x[chunk, :, place].to(stream.dtype))


@attrs.frozen(eq=False)
class ChunkPlan:
    """The groups of a stream's chunks, in the order of the scan.

    Documents are cut into chunks of C = 64 tokens from their own first token, so that no chunk holds two
    documents. Chunk i of every document that has one forms step i of the scan. Documents with most chunks come
    first, so the documents of a step are the first ones of the step before, and their states lie together.

    Args:
        groups: all of them.
        order: [N] int64, the documents in the order of the scan.
    """

    groups: tuple[Group, ...]
    order: Tensor

    @classmethod
    def of(cls, layout: SequenceLayout, size: int, heads: tuple[int, ...]) -> ChunkPlan:
        """The plan of a layout in groups of about ``size`` chunks, made once for it.

        Args:
            layout: where the documents begin.
            size: of a group.
            heads: the numbers of heads that streams will have.
        """
        return layout.derived(("chunk_plan", size, heads), lambda: cls._build(layout, size, heads))

    @classmethod
    def _build(cls, layout: SequenceLayout, size: int, heads: tuple[int, ...]) -> ChunkPlan:
        counts = [-(-length // CHUNK) for length in layout.lengths]
        order = sorted(range(len(counts)), key=lambda document: -counts[document])
        reach = torch.tensor(sorted(counts, reverse=True))
        active = [int((reach > step).sum()) for step in range(max(counts))] + [0]
        all_heads = {count: torch.arange(count, device=layout.device)[:, None] for count in heads}
        later = torch.full((CHUNK, CHUNK), float("-inf"), device=layout.device).triu(1)
        make = functools.partial(_group, layout, order, heads=all_heads, later=later)
        groups: list[Group] = []
        pending: list[tuple[int, int, int]] = []
        for step, count in enumerate(active[:-1]):
            for document in range(0, count, size):
                documents = min(size, count - document)
                if pending and sum(taken for _, _, taken in pending) + documents > size:
                    groups.append(make(_spans(pending, active)))
                    pending = []
                pending.append((step, document, documents))
        groups.append(make(_spans(pending, active)))
        return cls(groups=tuple(groups), order=torch.tensor(order, device=layout.device))


def _spans(taken: Sequence[tuple[int, int, int]], active: Sequence[int]) -> dict[Span, int]:
    """The spans of a group that takes (step, document, documents), and their steps."""
    chunks, count = {}, 0
    for step, document, documents in taken:
        chunks[step, document] = count
        count += documents
    return {
        Span(
            chunk=chunks[step, document],
            document=document,
            documents=documents,
            going_on=min(max(active[step + 1] - document, 0), documents),
            next=chunks.get((step + 1, document)),
            enters=(step - 1, document) not in chunks,
        ): step
        for step, document, documents in taken
    }


def _group(
    layout: SequenceLayout,
    order: Sequence[int],
    spans: dict[Span, int],
    *,
    heads: Mapping[int, Tensor],
    later: Tensor,
) -> Group:
    starts, ends = [], []
    for span, step in spans.items():
        for document in order[span.document : span.document + span.documents]:
            starts.append(layout.starts[document] + step * CHUNK)
            ends.append(layout.starts[document + 1])
    tokens, last = torch.tensor(starts)[:, None] + torch.arange(CHUNK), torch.tensor(ends)[:, None] - 1
    padding = tokens > last
    first = starts[0]
    follows = not padding.any() and torch.equal(tokens.flatten(), torch.arange(first, first + tokens.numel()))
    chunk, place = (~padding).nonzero(as_tuple=True)
    return Group(
        chunks=len(starts),
        spans=tuple(spans),
        fresh=sum(span.documents for span, step in spans.items() if step == 0),
        stretch=slice(first, first + tokens.numel()) if follows else None,
        tokens=torch.minimum(tokens, last)[:, None].to(layout.device),
        filled=tokens[~padding].to(layout.device),
        places=(chunk.to(layout.device), place.to(layout.device)),
        padding=padding[:, None].to(layout.device),
        heads=heads,
        later=later,
    )
