"""Which tokens of a rendered conversation are trained on, and how much each counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qwenft.data.template import PlacementError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qwenft.data.formats import Conversation
    from qwenft.data.template import Rendered, Segment
    from qwenft.specs.data import DataSpec

IGNORED = -100

Range = tuple[int, int, float]  # first character, the one behind the last, weight


def trained_ranges(conversation: Conversation, rendered: Rendered, data: DataSpec) -> list[Range]:
    """The characters of a rendered conversation that are trained, in order, those of one weight joined.

    Raises:
        PlacementError: a message that is to be trained has no text, or the template leaves its content out.
    """
    messages = conversation.messages
    of_roles = [place for place, message in enumerate(messages) if message["role"] in data.trained_roles]
    asked = set(of_roles[-1:] if data.turns == "last" else of_roles)
    left_out = {message for message, kind in rendered.lost if kind != "reasoning"}
    found: list[Range] = []
    for place, training in enumerate(conversation.training):
        parts = [part for _, part in conversation.parts.get(place, ())]
        train = place in asked if training.train is None else training.train
        if not train and not any(part.train for part in parts):
            continue
        turn = rendered.turns.get(place)
        if turn is None and isinstance(messages[place]["content"], list):
            continue  # images alone, which are never trained
        if turn is None or place in left_out:
            what = "the chat template leaves out" if place in left_out else "nothing is said in"
            msg = f"message {place + 1} is to be trained, and {what} its content"
            raise PlacementError(msg)
        weight = training.weight if train else 0.0
        content = [(turn.thought, turn.spoken, weight)]
        if parts:
            # A part that says nothing of its training goes with its message.
            of_parts = [
                training.weight * part.weight if (train if part.train is None else part.train) else 0.0
                for part in parts
            ]
            content = [
                (*_with_spaces(segment, rendered.text, messages[place]["content"]), of_parts[segment.part])
                for segment in rendered.segments
                if segment.message == place and segment.kind == "content"
            ]
        found += [
            (turn.start, turn.thought, weight if data.thinking == "keep" else 0.0),
            *content,
            (turn.spoken, turn.end, weight if data.tool_calls else 0.0),
            (turn.end, turn.stop, weight if data.end_of_turn else 0.0),
        ]
    return _joined(sorted(found))


def _with_spaces(segment: Segment, text: str, content: Any) -> tuple[int, int]:
    """Where a part of a content stands, with the whitespace at its ends where the template leaves it there."""
    if not isinstance(content, list):
        return segment.start, segment.stop
    said: str = content[segment.part]["text"]
    before = said[: len(said) - len(said.lstrip())]
    after = said[len(said.rstrip()) :]
    start, stop = segment.start - len(before), segment.stop + len(after)
    return (
        start if text[max(start, 0) : segment.start] == before else segment.start,
        stop if text[segment.stop : stop] == after else segment.stop,
    )


def _joined(ranges: Sequence[Range]) -> list[Range]:
    joined: list[Range] = []
    for start, stop, weight in ranges:
        if start == stop or weight == 0:
            continue
        if joined and joined[-1][1:] == (start, weight):
            joined[-1] = (joined[-1][0], stop, weight)
        else:
            joined.append((start, stop, weight))
    return joined


class Tokens:
    """The tokens of a text and the characters that each stands for.

    Args:
        encodings: of consecutive pieces of the text, from the ``tokenizers`` library.
        pieces: these.
    """

    def __init__(self, encodings: Sequence[Any], pieces: Sequence[str]) -> None:
        self.ids = np.concatenate([np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings])
        self._pieces = []
        characters = tokens = 0
        for encoding, text in zip(encodings, pieces, strict=True):
            self._pieces.append((characters, text, tokens, encoding))
            characters += len(text)
            tokens += len(encoding)

    def __len__(self) -> int:
        return len(self.ids)

    def beginning_at(self, character: int) -> int:
        """The first token that begins at a character, or behind the last where the text ends there.

        Raises:
            PlacementError: a token stands for this character and the one before it.
        """
        for start, text, tokens, encoding in self._pieces:
            place = character - start
            if place == 0:
                return tokens
            if place < len(text):
                token = encoding.char_to_token(place)
                if token is None or encoding.token_to_chars(token)[0] != place:
                    around = f"{text[max(place - 12, 0) : place]!r} and {text[place : place + 12]!r}"
                    msg = (
                        f"what is trained begins or ends inside a token, between {around}: tokens hold the space "
                        "before a word, so a part of a content begins with it"
                    )
                    raise PlacementError(msg)
                return tokens + int(token)
        return len(self)

    def texts(self) -> Iterator[tuple[int, str]]:
        """The first character of each token, and the text up to its end from the end of the one before it."""
        for start, text, _, encoding in self._pieces:
            done = 0
            for first, last in encoding.offsets:
                yield start + first, text[done:last]
                done = max(done, last)


def labels_of(tokens: Tokens, ranges: Sequence[Range]) -> tuple[np.ndarray, np.ndarray | None]:
    """Labels and weights, where they are predicted: position t holds the trained token t + 1, or -100.

    Args:
        tokens: of the rendered text.
        ranges: of its characters, trained.

    Returns:
        [T] int32, and [T] float32 or None where all weigh 1.

    Raises:
        PlacementError: a token stands across the bound of a range.
    """
    labels = np.full(len(tokens), IGNORED, dtype=np.int32)
    weights = np.ones(len(tokens), dtype=np.float32)
    for start, stop, weight in ranges:
        first, last = max(tokens.beginning_at(start), 1), tokens.beginning_at(stop)
        labels[first - 1 : last - 1] = tokens.ids[first:last]
        weights[first - 1 : last - 1] = weight
    return labels, None if (weights == 1).all() else weights
