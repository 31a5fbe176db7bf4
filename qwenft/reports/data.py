"""What a model will meet in the data: every token with its role and weight, and the whole in numbers."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
from collections import Counter
from html import escape
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from qwenft.data.chat import ChatEncoder, ShownToken
from qwenft.data.media import load_media_encoder
from qwenft.display import html_table, text_table
from qwenft.models.checkpoint import architecture_of, checkpoint_folder
from qwenft.models.load import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenft.data.pictures import Picture
    from qwenft.errors import DataError
    from qwenft.specs.data import DataSpec
    from qwenft.specs.model import ModelSpec

# Of a role: the ground in HTML, readable under dark and light text alike, and the colour in a terminal.
_GROUNDS = {
    "system": "rgba(150,150,150,.22)",
    "user": "rgba(60,130,246,.22)",
    "assistant": "rgba(20,180,110,.25)",
    "tool": "rgba(240,160,20,.25)",
    "text": "rgba(20,180,110,.25)",
}
_COLOURS = {"system": 90, "user": 34, "assistant": 32, "tool": 33, "text": 32}
_TRAINED, _END = "\033[1;4m", "\033[0m"
_FRAMES, _SIDE = 8, 160  # of a video that are shown, and of a small copy in pixels
_NEAR_EMPTY = 3  # trained tokens of a document, the end of the turn among them


@attrs.frozen(eq=False)
class Preview:
    """Documents token by token: the colour is the role, what is underlined is trained.

    Args:
        documents: of each, its tokens.
    """

    documents: tuple[tuple[ShownToken, ...], ...]

    def __str__(self) -> str:
        """Colours and underlines for a terminal."""
        legend = " ".join(f"\033[{_COLOURS[role]}m{role}{_END}" for role in self._roles())
        shown = [
            "".join(self._run(run.text, run.role, run.weight) for run in _runs(document))
            for document in self.documents
        ]
        return "\n\n".join([f"{legend}   {_TRAINED}trained{_END}", *shown])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        legend = " ".join(self._html(role, role, 0.0) for role in self._roles())
        shown = [
            f'<p style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7">{text}</p>'
            for document in self.documents
            for text in ["".join(map(self._shown, _runs(document)))]
        ]
        head = f"<p>{legend} {self._html('trained', '', 1.0)}</p>"
        return f'<div style="font-family:monospace;max-width:900px">{head}{"<hr>".join(shown)}</div>'

    def _roles(self) -> list[str]:
        return list(dict.fromkeys(token.role for document in self.documents for token in document))

    def _shown(self, run: ShownToken) -> str:
        return self._html(run.text, run.role, run.weight) + _thumbnails(run.pictures)

    @staticmethod
    def _run(text: str, role: str, weight: float) -> str:
        colour = f"\033[{_COLOURS[role]}m"
        return f"{colour}{_TRAINED if weight else ''}{text}{_END}"

    @staticmethod
    def _html(text: str, role: str, weight: float) -> str:
        ground = f"background:{_GROUNDS[role]};" if role else ""
        line = "border-bottom:2px solid rgb(20,160,90);font-weight:600;" if weight else ""
        title = f' title="weight {weight:g}"' if weight not in {0.0, 1.0} else ""
        return f'<span style="{ground}{line}"{title}>{escape(text)}</span>'


def _runs(document: Sequence[ShownToken]) -> list[ShownToken]:
    """Neighbouring tokens of one role and weight as one; an image or a video is one by itself."""
    grouped = itertools.groupby(document, key=lambda token: attrs.evolve(token, text=""))
    return [attrs.evolve(alike, text="".join(token.text for token in tokens)) for alike, tokens in grouped]


def _thumbnails(pictures: Sequence[Picture]) -> str:
    """Small copies of an image, or of the first frames of a video, as HTML."""
    shown = []
    for number, picture in enumerate(pictures[:_FRAMES], 1):
        image = picture.open()
        image.thumbnail((_SIDE, _SIDE))
        encoded = io.BytesIO()
        image.save(encoded, format="PNG")
        data = base64.b64encode(encoded.getvalue()).decode()
        kind = f"frame {number} of {len(pictures)}" if len(pictures) > 1 else "image"
        alt = f"{kind}, {picture.width} x {picture.height}"
        style = "vertical-align:middle;margin:2px"
        shown.append(f'<img style="{style}" alt="{alt}" title="{alt}" src="data:image/png;base64,{data}">')
    return "".join(shown)


@attrs.frozen(eq=False)
class Description:
    """Data in numbers.

    Args:
        lengths: [N] tokens of each document, before the length policy.
        supervised: [N] trained tokens of each.
        max_length: that the data allow.
        duplicates: documents whose tokens another one before them has.
        near_empty: documents of at most three trained tokens.
        lost: (what the chat template leaves out, in how many rows).
        refused: the errors of rows that are wrong.
    """

    lengths: np.ndarray
    supervised: np.ndarray
    max_length: int
    duplicates: int
    near_empty: int
    lost: tuple[tuple[str, int], ...]
    refused: tuple[DataError, ...]

    def rows(self) -> list[tuple[str, str]]:
        """What is known, a line each."""
        wrong = [str(error).splitlines()[0] for error in self.refused]
        return [
            ("documents", f"{len(self.lengths):,}"),
            *(self._of_documents() if len(self.lengths) else ()),
            ("rows refused", f"{len(wrong):,}"),
            *(("", line) for line in wrong[:5]),
        ]

    def _of_documents(self) -> list[tuple[str, str]]:
        tokens, supervised = int(self.lengths.sum()), int(self.supervised.sum())
        parts = ", ".join(f"{int(q):,}" for q in np.percentile(self.lengths, [5, 25, 50, 75, 95]))
        longer = self.lengths > self.max_length
        in_longer = self.lengths[longer].sum() / tokens
        return [
            ("tokens", f"{tokens:,}, {supervised:,} of them trained ({supervised / tokens:.0%})"),
            ("lengths", f"{self.lengths.min():,} to {self.lengths.max():,}; 5, 25, 50, 75, 95 %: {parts}"),
            ("too long", f"{longer.sum():,} above {self.max_length:,} tokens, with {in_longer:.1%} of all tokens"),
            ("duplicates", f"{self.duplicates:,}"),
            ("near empty", f"{self.near_empty:,} of at most {_NEAR_EMPTY} trained tokens"),
            *(("left out", f"{what} in {count:,} rows, by the chat template") for what, count in self.lost),
        ]

    def __str__(self) -> str:
        return text_table(("", ""), self.rows()).strip("\n ")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table((), self.rows())

    def plot(self) -> Any:
        """How long the documents are, and how much of them is trained.

        Returns:
            A matplotlib figure.
        """
        from qwenft.reports.plots import plot_lengths

        return plot_lengths(self.lengths, self.supervised, self.max_length)


def preview(data: DataSpec, model: ModelSpec, n: int) -> Preview:
    """The first ``n`` documents of each part of the data; see :meth:`qwenft.DataSpec.preview`."""
    encoder = _encoder(model)
    shown = (
        document
        for part, _ in data.parts
        for document in itertools.islice(encoder.shown(part, [] if part.bad_rows == "skip" else None), n)
    )
    return Preview(tuple(map(tuple, shown)))


def describe(data: DataSpec, model: ModelSpec) -> Description:
    """The data in numbers; see :meth:`qwenft.DataSpec.describe`."""
    refused: list[DataError] = []
    lengths, supervised = [], []
    seen: set[bytes] = set()
    duplicates = 0
    lost: Counter[str] = Counter()
    encoder = _encoder(model)
    for document in (found for part, _ in data.parts for found in encoder.encode(part, refused)):
        lengths.append(len(document))
        supervised.append(document.supervised)
        lost.update(document.lost)
        key = hashlib.sha256(document.input_ids.tobytes()).digest()
        duplicates += key in seen
        seen.add(key)
    trained = np.asarray(supervised, dtype=np.int64)
    return Description(
        lengths=np.asarray(lengths, dtype=np.int64),
        supervised=trained,
        max_length=data.max_length,
        duplicates=duplicates,
        near_empty=int((trained <= _NEAR_EMPTY).sum()),
        lost=tuple(sorted(lost.items())),
        refused=tuple(refused),
    )


def _encoder(model: ModelSpec) -> ChatEncoder:
    folder, architecture = checkpoint_folder(model), architecture_of(model)
    tokenizer = load_tokenizer(folder)
    return ChatEncoder(tokenizer, load_media_encoder(folder, architecture, tokenizer))
