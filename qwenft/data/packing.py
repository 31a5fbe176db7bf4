"""Which documents share a row."""

from __future__ import annotations

import bisect
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int, *, seed: int = 0) -> list[list[int]]:
    """Put documents into bins of ``capacity`` tokens: best fit, longest first (Johnson, 1973).

    Documents of one length are taken in a random order and the bins come in a random order, so that epochs
    with other seeds see other neighbours.

    Args:
        lengths: of each document, in tokens, none above ``capacity``.
        capacity: of a bin, in tokens.
        seed: of both orders.

    Returns:
        Bins of document indices; every document is in exactly one.

    Raises:
        ValueError: a document does not fit a bin.

    Examples:
        >>> sorted(sorted(documents) for documents in pack([6, 4, 3, 7], capacity=10))
        [[0, 1], [2, 3]]
    """
    if lengths and max(lengths) > capacity:
        msg = f"lengths: expected at most the capacity of {capacity} tokens, got {max(lengths)}"
        raise ValueError(msg)
    shuffle = random.Random(seed)
    order = list(range(len(lengths)))
    shuffle.shuffle(order)
    order.sort(key=lambda document: -lengths[document])
    bins: list[list[int]] = []
    by_space: dict[int, list[int]] = {}  # tokens left: the bins that have them
    spaces: list[int] = []  # the keys of these, sorted: no more than the capacity
    for document in order:
        length = lengths[document]
        place = bisect.bisect_left(spaces, length)
        if place == len(spaces):
            left, number = capacity, len(bins)
            bins.append([])
        else:
            left = spaces[place]
            number = by_space[left].pop()
            if not by_space[left]:
                del by_space[left], spaces[place]
        bins[number].append(document)
        left -= length
        if left in by_space:
            by_space[left].append(number)
        elif left:
            by_space[left] = [number]
            bisect.insort(spaces, left)
    shuffle.shuffle(bins)
    return bins
