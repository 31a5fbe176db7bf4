"""A tokenised conversation, whole or in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np

from qwenft.data.masking import IGNORED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwenft.data.media import Medium


@attrs.frozen(eq=False)
class Document:
    """A tokenised conversation.

    Args:
        input_ids: [T] int32.
        labels: [T] int32: position t holds the token that it is trained to predict, or -100.
        file: where its row lies.
        row: its number there, counted from 1.
        weights: [T] float32, of the positions in the loss; 1 everywhere where None.
        ends: [M] int32, behind the last token of each message that ends with a control token.
        lost: what the row holds and the template leaves out, such as "reasoning" or "content of the system".
        times: how often an epoch takes it.
        media: its images and videos, in their order.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    file: str
    row: int
    weights: np.ndarray | None = None
    ends: np.ndarray = attrs.field(factory=lambda: np.zeros(0, dtype=np.int32))
    lost: tuple[str, ...] = ()
    times: float = 1.0
    media: tuple[Medium, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        """How many positions are trained."""
        return int((self.labels != IGNORED).sum())

    def piece(self, start: int, stop: int, *, trained_from: int) -> Document:
        """Its tokens ``start`` to ``stop``, of which those from ``trained_from`` on are predicted."""
        labels = self.labels[start:stop].copy()
        labels[: max(trained_from - 1 - start, 0)] = IGNORED
        labels[-1] = IGNORED
        return attrs.evolve(
            self,
            input_ids=self.input_ids[start:stop],
            labels=labels,
            weights=None if self.weights is None else self.weights[start:stop],
            ends=self.ends[(self.ends > start) & (self.ends <= stop)] - start,
            media=tuple(medium.moved(-start) for medium in self.media if start <= medium.bounds[0] < stop),
        )

    def last_end(self, start: int, stop: int) -> int:
        """Behind the last message that ends after token ``start`` and not after ``stop``; 0 if there is none."""
        ends = self.ends[(self.ends > start) & (self.ends <= stop)]
        return int(ends[-1]) if len(ends) else 0

    def split(self, length: int, overlap: int) -> Iterator[Document]:
        """Pieces of at most ``length`` tokens that end where messages do, each of its tokens predicted in one.

        Args:
            length: of a piece, at the most. A message that is longer is cut into pieces as they fill.
            overlap: the most tokens, of whole messages, that a piece repeats from the ones before it, as context.
        """
        done, starts = 0, [0]
        while done < len(self):
            for start in starts:  # with as much context as leaves room for a message
                end = len(self) if len(self) - start <= length else self.last_end(done, start + length)
                if end:
                    break
            stop = end or self._before_medium(start + length)
            if stop <= done:
                return  # an image or video is longer than a piece
            yield self.piece(start, stop, trained_from=done)
            done = stop
            before = self.ends[(self.ends >= done - overlap) & (self.ends < done)]
            # A token in the middle of a message is predicted from the one before it.
            starts = [*map(int, before), done if end else self._before_medium(done - 1)]

    def _before_medium(self, place: int) -> int:
        """A place that is in no image or video: itself, or in front of what encloses the one that it is in."""
        return next((m.bounds[0] for m in self.media if m.bounds[0] < place < m.bounds[1]), place)
