"""Which tokens of a rendered conversation are trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

IGNORED = -100


@attrs.frozen
class TurnMarks:
    """The control tokens by which a rendered conversation is read.

    Args:
        header: ids of ``<|im_start|>assistant``.
        end: id of ``<|im_end|>``.
        prompt: ids that the template adds to ask for an answer: the header, a line break and, depending on the
            template, an opened or an empty think block.
    """

    header: tuple[int, ...]
    end: int
    prompt: tuple[int, ...]


def trained_spans(ids: Sequence[int], marks: TurnMarks) -> list[tuple[int, int]]:
    """Where each assistant turn writes: from behind the generation prompt to its ``<|im_end|>``, included.

    What the template puts before an answer when it asks for one is never the model's to write, so the longest
    common beginning of the turn and the generation prompt is left out.

    Args:
        ids: the whole rendered conversation.
        marks: its control tokens.

    Returns:
        Half-open ranges of positions in ``ids``, one for each assistant turn.
    """
    spans = []
    width = len(marks.header)
    for start in range(len(ids) - width + 1):
        if ids[start] == marks.header[0] and tuple(ids[start : start + width]) == marks.header:
            first = start + _common_beginning(ids[start:], marks.prompt)
            last = _index(ids, marks.end, first)
            spans.append((first, last))
    return spans


def labels_of(ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Labels aligned with the position that predicts: position t holds the trained token t + 1, or -100."""
    labels = [IGNORED] * len(ids)
    for first, last in spans:
        for position in range(max(first, 1), last):
            labels[position - 1] = ids[position]
    return labels


def _common_beginning(ids: Sequence[int], prompt: Sequence[int]) -> int:
    length = 0
    for token, expected in zip(ids, prompt, strict=False):
        if token != expected:
            break
        length += 1
    return length


def _index(ids: Sequence[int], token: int, start: int) -> int:
    """One behind the first ``token`` from ``start`` on; the end of ``ids`` where there is none."""
    for position in range(start, len(ids)):
        if ids[position] == token:
            return position + 1
    return len(ids)
