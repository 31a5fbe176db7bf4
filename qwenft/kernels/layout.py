"""Where the documents of a flat stream begin."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

T = TypeVar("T")


class SequenceLayout:
    """N documents, one after the other, in one row of T tokens; no padding.

    Every layer of a model is handed the same object, so what kernels derive from it (chunk plans, masks) is
    computed once a micro-batch and kept here.

    Args:
        lengths: the tokens of each document, all at least 1.
        query_lengths: how many of each document's last tokens ask in attention; all of them where None.
        device: where the tensors live.

    Attributes:
        lengths: N ints.
        query_lengths: N ints.
        starts: N + 1 ints: 0, the boundaries, T. The same as ``cu_seqlens``, on the host.
        max_length: the longest document, in tokens.
        total: T.

    Examples:
        >>> layout = SequenceLayout.from_lengths([3, 2])
        >>> layout.cu_seqlens
        tensor([0, 3, 5], dtype=torch.int32)
        >>> layout.position_ids
        tensor([0, 1, 2, 0, 1])
        >>> layout.document_ids
        tensor([0, 0, 0, 1, 1])
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        query_lengths: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.lengths = tuple(int(length) for length in lengths)
        if not self.lengths or min(self.lengths) < 1:
            msg = f"lengths: every document needs at least one token, a layout one document; got {list(lengths)}"
            raise ValueError(msg)
        self.query_lengths = self.lengths if query_lengths is None else tuple(map(int, query_lengths))
        if len(self.query_lengths) != len(self.lengths) or any(
            not 1 <= asked <= length for asked, length in zip(self.query_lengths, self.lengths, strict=True)
        ):
            msg = f"query_lengths: expected 1 to the document's length for each, got {list(self.query_lengths)}"
            raise ValueError(msg)
        self.starts = (0, *accumulate(self.lengths))
        self.total = self.starts[-1]
        self.max_length = max(self.lengths)
        self.device = torch.device(device)
        self._derived: dict[Hashable, Any] = {}

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], *, device: torch.device | str = "cpu") -> SequenceLayout:
        """The layout of documents of these lengths, in tokens."""
        return cls(lengths, device=device)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Sequence[int], *, total: int | None = None) -> SequenceLayout:
        """The layout of documents with these boundaries: 0, increasing, and T at the end.

        Raises:
            ValueError: the boundaries are anything else.
        """
        starts = [int(start) for start in cu_seqlens]
        if len(starts) < 2 or starts[0] != 0 or any(b <= a for a, b in pairwise(starts)):
            msg = f"cu_seqlens: expected 0 first and then increasing boundaries, got {starts}"
            raise ValueError(msg)
        if total is not None and starts[-1] != total:
            msg = f"cu_seqlens: expected to end at the {total} tokens of the stream, got {starts[-1]}"
            raise ValueError(msg)
        device = cu_seqlens.device if isinstance(cu_seqlens, torch.Tensor) else "cpu"
        return cls([b - a for a, b in pairwise(starts)], device=device)

    def to(self, device: torch.device | str) -> SequenceLayout:
        """The same layout with its tensors on ``device``."""
        if torch.device(device) == self.device:
            return self
        return SequenceLayout(self.lengths, query_lengths=self.query_lengths, device=device)

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns, computed once for this layout."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """[N + 1] int32, on the layout's device."""
        return self.derived("cu_seqlens", lambda: torch.tensor(self.starts, dtype=torch.int32, device=self.device))

    @property
    def document_ids(self) -> torch.Tensor:
        """[T] int64: which document each token belongs to."""
        return self.derived("document_ids", self._document_ids)

    @property
    def position_ids(self) -> torch.Tensor:
        """[T] int64: each token's place in its document, from 0."""
        return self.derived("position_ids", self._position_ids)

    def _document_ids(self) -> torch.Tensor:
        lengths = torch.tensor(self.lengths)
        return torch.repeat_interleave(torch.arange(len(self.lengths)), lengths).to(self.device)

    def _position_ids(self) -> torch.Tensor:
        starts = torch.tensor(self.starts[:-1])
        lengths = torch.tensor(self.lengths)
        return (torch.arange(self.total) - torch.repeat_interleave(starts, lengths)).to(self.device)

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"SequenceLayout(lengths={list(self.lengths)}, device={str(self.device)!r})"
