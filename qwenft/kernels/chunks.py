"""Chunks of all documents of a stream, placed so that documents advance side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwenft.kernels.layout import SequenceLayout

CHUNK = 64


@attrs.frozen(eq=False)
class ChunkPlan:
    """Where the B chunks of a stream lie, and which of them a sequential scan visits together.

    Documents are cut into chunks of C = 64 tokens from their own first token, so that no chunk holds two
    documents. Chunk i of every document that has one forms step i; documents with most chunks come first, so
    the documents of step i + 1 are the first ones of step i and a state needs no gathering between steps.

    Args:
        tokens: T.
        chunks: B.
        steps: for each step its first chunk, its documents, and how many of them go on to the next step.
        order: [N] int64, the documents in the order of the scan.
        slots: [T] int64, where each token lies among the B * C places.
        is_stream: the places are the tokens, in order and with no padding.
        later: [C, C], minus infinity where the column is later than the row, else 0.
    """

    tokens: int
    chunks: int
    steps: tuple[tuple[int, int, int], ...]
    order: torch.Tensor
    slots: torch.Tensor
    is_stream: bool
    later: torch.Tensor

    @classmethod
    def of(cls, layout: SequenceLayout) -> ChunkPlan:
        """The plan of a layout, made once for it."""
        return layout.derived("chunk_plan", lambda: cls._build(layout))

    @classmethod
    def _build(cls, layout: SequenceLayout) -> ChunkPlan:
        counts = [-(-length // CHUNK) for length in layout.lengths]
        order = sorted(range(len(counts)), key=lambda document: -counts[document])
        documents = [sum(count > step for count in counts) for step in range(max(counts))]
        first = [sum(documents[:step]) for step in range(len(documents))]
        rank = torch.empty(len(order), dtype=torch.int64)
        rank[order] = torch.arange(len(order))
        position = layout.position_ids.cpu()
        chunk = torch.tensor(first)[position // CHUNK] + rank[layout.document_ids.cpu()]
        slots = chunk * CHUNK + position % CHUNK
        chunks = sum(counts)
        return cls(
            tokens=layout.total,
            chunks=chunks,
            steps=tuple(zip(first, documents, [*documents[1:], 0], strict=True)),
            order=torch.tensor(order, device=layout.device),
            slots=slots.to(layout.device),
            is_stream=chunks * CHUNK == layout.total and torch.equal(slots, torch.arange(layout.total)),
            later=torch.full((CHUNK, CHUNK), float("-inf"), device=layout.device).triu(1),
        )

    def forwards(self, heads: int) -> Iterator[tuple[slice, slice, slice, slice]]:
        """Walk the scan: the rows of chunks flattened with their heads that each step touches.

        Args:
            heads: heads a chunk.

        Yields:
            The rows of the step, those of them whose document goes on, the rows that these reach in the next
            step, and those whose document ends here.
        """
        for first, documents, going_on in self.steps:
            start, stop, split = first * heads, (first + documents) * heads, (first + going_on) * heads
            yield slice(start, stop), slice(start, split), slice(stop, stop + split - start), slice(split, stop)

    def gather(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Cut a stream into chunks.

        Args:
            x: [T, heads, ...].
            dtype: of the result.

        Returns:
            [B, heads, C, ...], contiguous, zero at the places after a document's last token.
        """
        if not self.is_stream:
            places = x.new_zeros(self.chunks * CHUNK, *x.shape[1:], dtype=dtype)
            x = places.index_copy_(0, self.slots, x.to(dtype))
        return x.reshape(self.chunks, CHUNK, *x.shape[1:]).transpose(1, 2).to(dtype).contiguous()

    def scatter(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Put chunks [B, heads, C, ...] back into a stream [T, heads, ...] of ``dtype``."""
        places = x.transpose(1, 2).reshape(self.chunks * CHUNK, x.shape[1], *x.shape[3:])
        return (places if self.is_stream else places.index_select(0, self.slots)).to(dtype)
