"""Chunks of all documents of a stream, placed so that documents advance side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

if TYPE_CHECKING:
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
    """

    chunk: int
    document: int
    documents: int
    going_on: int

    def rows(self, heads: int, documents: int, first: int = 0) -> slice:
        """The rows of the first ``documents`` chunks in tensors that flatten the group's chunks and heads.

        Args:
            heads: of the tensors.
            documents: how many.
            first: the group's chunk that the tensors begin with.
        """
        chunk = self.chunk - first
        return slice(chunk * heads, (chunk + documents) * heads)

    def carried(self, heads: int, documents: int) -> slice:
        """The rows of the same documents in tensors that flatten all documents and heads."""
        return slice(self.document * heads, (self.document + documents) * heads)


@attrs.frozen(eq=False)
class Group:
    """B chunks that are computed together, in consecutive spans.

    Args:
        chunks: B.
        spans: in the order of the scan.
        fresh: how many of these, the first ones, begin their documents.
        stretch: the tokens, where they follow each other in the stream and fill the chunks.
        tokens: [B * C] int64, the token at each place; any token at a place after a document's end.
        filled: int64, the places that hold a token.
        padding: int64, those that do not.
        later: [C, C], minus infinity where the column is later than the row, else 0.
    """

    chunks: int
    spans: tuple[Span, ...]
    fresh: int
    stretch: slice | None
    tokens: Tensor
    filled: Tensor
    padding: Tensor
    later: Tensor

    def gather(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Cut this group's tokens out of a stream.

        Args:
            x: [T, heads, ...].
            dtype: of the result.

        Returns:
            [B, heads, C, ...], contiguous, zero at the places after a document's last token.
        """
        if self.stretch is not None:
            places = x[self.stretch]
        else:
            places = x.index_select(0, self.tokens).index_fill_(0, self.padding, 0)
        return places.reshape(self.chunks, CHUNK, *x.shape[1:]).transpose(1, 2).to(dtype).contiguous()

    def scatter(self, x: Tensor, stream: Tensor) -> None:
        """Write chunks [B, heads, C, ...] into their places of a stream [T, heads, ...]."""
        places = x.transpose(1, 2)
        if self.stretch is not None:
            stream[self.stretch].view(places.shape).copy_(places)
            return
        places = places.reshape(self.chunks * CHUNK, *stream.shape[1:]).to(stream.dtype)
        stream.index_copy_(0, self.tokens[self.filled], places[self.filled])


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
    def of(cls, layout: SequenceLayout, size: int) -> ChunkPlan:
        """The plan of a layout in groups of about ``size`` chunks, made once for it."""
        return layout.derived(("chunk_plan", size), lambda: cls._build(layout, size))

    @classmethod
    def _build(cls, layout: SequenceLayout, size: int) -> ChunkPlan:
        counts = [-(-length // CHUNK) for length in layout.lengths]
        order = sorted(range(len(counts)), key=lambda document: -counts[document])
        reach = torch.tensor(sorted(counts, reverse=True))
        active = [int((reach > step).sum()) for step in range(max(counts))] + [0]
        groups: list[Group] = []
        pending: list[tuple[int, Span]] = []
        for step in range(max(counts)):
            for document in range(0, active[step], size):
                documents = min(size, active[step] - document)
                going_on = min(max(active[step + 1] - document, 0), documents)
                taken = sum(span.documents for _, span in pending)
                if pending and taken + documents > size:
                    groups.append(_group(layout, order, pending))
                    pending, taken = [], 0
                pending.append((step, Span(taken, document, documents, going_on)))
        groups.append(_group(layout, order, pending))
        return cls(groups=tuple(groups), order=torch.tensor(order, device=layout.device))


def _group(layout: SequenceLayout, order: list[int], steps_and_spans: list[tuple[int, Span]]) -> Group:
    starts, ends = [], []
    for step, span in steps_and_spans:
        for document in order[span.document : span.document + span.documents]:
            starts.append(layout.starts[document] + step * CHUNK)
            ends.append(layout.starts[document + 1])
    tokens = torch.tensor(starts)[:, None] + torch.arange(CHUNK)
    holds = tokens < torch.tensor(ends)[:, None]
    tokens, holds = torch.where(holds, tokens, 0).flatten(), holds.flatten()
    first = starts[0]
    follows = bool(holds.all()) and torch.equal(tokens, torch.arange(first, first + len(tokens)))
    return Group(
        chunks=len(starts),
        spans=tuple(span for _, span in steps_and_spans),
        fresh=sum(span.documents for step, span in steps_and_spans if step == 0),
        stretch=slice(first, first + len(tokens)) if follows else None,
        tokens=tokens.to(layout.device),
        filled=holds.nonzero().flatten().to(layout.device),
        padding=(~holds).nonzero().flatten().to(layout.device),
        later=layout.derived(
            "later", lambda: torch.full((CHUNK, CHUNK), float("-inf"), device=layout.device).triu(1)
        ),
    )
