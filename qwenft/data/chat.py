"""Conversations rendered by the checkpoint's own template and tokenised."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from qwenft.data.cache import folder
from qwenft.data.document import Document
from qwenft.data.formats import MEDIA, conversation
from qwenft.data.masking import IGNORED, Tokens, labels_of, trained_ranges
from qwenft.data.media import FPS
from qwenft.data.pictures import PictureError, Pictures
from qwenft.data.sources import Row, read_rows
from qwenft.data.template import ChatTemplate, PlacementError, Rendered, texts_of
from qwenft.errors import DataError
from qwenft.specs.data import DataSpec

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from qwenft.data.formats import Conversation
    from qwenft.data.media import MediaEncoder, Medium
    from qwenft.data.pictures import Picture
    from qwenft.family.architectures import VisionTokens
    from qwenft.specs.images import ImageSpec

_RENDERED_AT_ONCE = 1000  # conversations handed to the tokenizer's threads together
_MESSAGES = DataSpec.messages("messages.jsonl")
_SCALES = 12  # halvings of the range in which a scale of images is sought


@attrs.frozen
class ShownToken:
    """A token as a person reads it.

    Args:
        text: what it stands for.
        role: of the message that it belongs to, with what the template writes around it.
        weight: in the loss; 0 where it is not trained.
        pictures: an image, or the frames of a video, that it stands for.
    """

    text: str
    role: str
    weight: float
    pictures: tuple[Picture, ...] = ()


@attrs.frozen(eq=False)
class _Asked:
    """A row, what it says, the control tokens that it spells: (where, token), and its images and videos."""

    row: Row
    said: Conversation
    spelt: tuple[tuple[str, str], ...]
    media: tuple[Medium, ...]


@attrs.frozen(eq=False)
class _Rendered:
    """A row on its way: what it says and its rendered text, in pieces that are tokenised on their own."""

    row: Row
    conversation: Conversation
    rendered: Rendered
    pieces: tuple[tuple[str, bool], ...]  # (text, whether control tokens in it are plain text)
    media: tuple[Medium, ...] = ()


class ChatEncoder:
    """Rows to documents with a checkpoint's tokenizer.

    Args:
        tokenizer: transformers' tokenizer of the checkpoint, with its chat template.
        media: of the checkpoint; None for a model that is loaded without its tower, or has no image processor.

    Raises:
        DataError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, media: MediaEncoder | None = None) -> None:
        if tokenizer.chat_template is None:
            raise DataError("the checkpoint's tokenizer has no chat template", fix="add chat_template.jinja to it")
        self.tokenizer = tokenizer
        self.media = media

    def template(self, options: Mapping[str, Any] | None = None) -> ChatTemplate:
        """The checkpoint's chat template with these options.

        Raises:
            DataError: it does not render a question and an answer.
        """
        try:
            return ChatTemplate(self.tokenizer, options or {})
        except PlacementError as error:
            raise DataError(
                f"{self.tokenizer.name_or_path}: a question and an answer: {error}",
                fix="another chat template, or other options of it",
            ) from None

    def encode(
        self, data: DataSpec, skipped: list[DataError] | None = None, rows: Iterable[Row] | None = None
    ) -> Iterator[Document]:
        """The documents of a source, in its order, of any length.

        Args:
            data: what to read, and how it is trained.
            skipped: takes the errors of rows that are wrong, which are left out; raised where None.
            rows: some of the source's; all of them where None.

        Raises:
            DataError: a row cannot be read or rendered, or its turns cannot be told apart; it names file and row.
        """
        return (document for document, _ in self._encoded(data, skipped, rows))

    def shown(self, data: DataSpec, skipped: list[DataError] | None = None) -> Iterator[list[ShownToken]]:
        """The documents of :meth:`encode`, token by token."""
        end = self.template(data.template_options).end
        for document, (one, tokens, plain) in self._encoded(data, skipped):
            placeholders = None if self.media is None else self.media.tokens
            yield list(_shown(plain, one, tokens, end=end, media=document.media, placeholders=placeholders))

    def _encoded(
        self, data: DataSpec, skipped: list[DataError] | None, rows: Iterable[Row] | None = None
    ) -> Iterator[tuple[Document, tuple[_Rendered, Tokens, Document]]]:
        template = self.template(data.template_options)

        def refuse(error: DataError) -> None:
            if skipped is None:
                raise error
            skipped.append(error)

        left = read_rows(data, refuse) if rows is None else iter(rows)
        while chunk := list(itertools.islice(left, _RENDERED_AT_ONCE)):
            asked = list(_kept(refuse, partial(self._asked, data=data, template=template), chunk))
            texts = self._texts_of(asked, template)
            rendered = list(_kept(refuse, partial(_rendered, template=template), asked, texts))
            tokens = list(self._tokenise(rendered))
            yield from _kept(refuse, partial(self._finished, data=data), rendered, tokens)

    def prompt(self, messages: Sequence[Mapping[str, Any]], images: ImageSpec) -> Document:
        """The tokens that ask for an answer to messages, with their images and videos.

        Raises:
            DataError: a message is none, or holds an image that cannot be seen.
        """
        row = Row({"messages": list(messages)}, "the messages", 1)
        said = conversation(row, _MESSAGES)
        media = self._media_of(row, said, images, {})
        ids = self.tokenizer(self.template().ask(said.messages), add_special_tokens=False)["input_ids"]
        plain = np.asarray(ids, dtype=np.int32)
        asked = Document(plain, np.full(len(plain), IGNORED, dtype=np.int32), row.file, row.number)
        return self._placed(row, asked, media)

    def _asked(self, row: Row, data: DataSpec, template: ChatTemplate) -> _Asked:
        said = conversation(row, data)
        if data.thinking == "drop":
            said = _without_reasoning(said)
        media = self._media_of(row, said, data.images, data.names)
        spelt = tuple(_spelt(said, template.control_tokens))
        if spelt and data.control_tokens == "refuse":
            where, token = spelt[0]
            raise row.error(
                f"{where} holds the control token {token}",
                'remove it, or .with_control_tokens("encode") to take it for plain text',
            )
        return _Asked(row, said, spelt, media)

    def _media_of(
        self, row: Row, said: Conversation, images: ImageSpec, names: Mapping[str, str]
    ) -> tuple[Medium, ...]:
        """The images and videos of a conversation, measured; parts that name none take those of the column."""
        found: list[Medium] = []
        column = row.values.get(names.get("images", ""))
        apart = [] if column is None else list(column) if isinstance(column, list | tuple) else [column]
        for message in said.messages:
            for part in message["content"] if isinstance(message.get("content"), list) else ():
                if "text" in part and not any(kind in part for kind in MEDIA):
                    continue
                if self.media is None:
                    raise row.error(
                        "holds an image or a video, and the model is loaded without its tower, or has no image "
                        "processor",
                        "recipe.with_model(vision=True), preprocessor_config.json beside its weights, or leave "
                        "the row out",
                    )
                if not any(part.get(kind) is not None for kind in MEDIA) and apart:
                    part = {**part, part.get("type", "image"): apart.pop(0)}  # noqa: PLW2901 - the same part, whole
                try:
                    found.append(_measured(part, self.media, images))
                except PictureError as error:
                    raise row.error(f"image {len(found) + 1}: {error}", error.fix) from None
        if apart:
            problem = f"{len(apart)} more images in its column than parts that ask for one"
            raise row.error(problem, '{"type": "image"} in a content for each')
        return tuple(found)

    def _finished(
        self, one: _Rendered, tokens: Tokens, data: DataSpec
    ) -> tuple[Document, tuple[_Rendered, Tokens, Document]]:
        """A document, what it was made of, and what it was before its media had their tokens."""
        plain = _document(one, tokens, data)
        placed = self._placed(one.row, plain, one.media)
        if data.overflow == "resize" and len(placed) > data.max_length and one.media:
            placed = self._resized(one, plain, placed, data)
        return placed, (one, tokens, plain)

    def _placed(self, row: Row, plain: Document, media: Sequence[Medium]) -> Document:
        if self.media is None:
            return plain
        try:
            return self.media.placed(plain, media)
        except PictureError as error:
            raise row.error(str(error), error.fix) from None

    def _resized(self, one: _Rendered, plain: Document, placed: Document, data: DataSpec) -> Document:
        """The document with its images scaled down, all by as much, until it fits; as it is where none does."""
        assert self.media is not None
        low, high = 0.0, 1.0
        for _ in range(_SCALES):
            scale = (low + high) / 2
            smaller = [self.media.scaled(medium, scale) for medium in one.media]
            found = self._placed(one.row, plain, smaller)
            if len(found) > data.max_length:
                high = scale
            else:
                low, placed = scale, found
        return placed

    def _texts_of(self, asked: Sequence[_Asked], template: ChatTemplate) -> Iterator[Rendered | PlacementError]:
        """What the template makes of each; plain text is followed by the token that ends a text."""
        chats = iter(template.render([one.said for one in asked if one.said.text is None]))
        end = self.tokenizer.eos_token or ""
        for one in asked:
            yield next(chats) if one.said.text is None else Rendered(one.said.text + end, (), {}, ())

    def _tokenise(self, rendered: Sequence[_Rendered]) -> Iterator[Tokens]:
        """The tokens of every row, in two batches: text whose control tokens act, and text that is plain."""
        backend = self.tokenizer.backend_tokenizer
        encoded: dict[bool, Iterator[Any]] = {}
        for plain in (False, True):
            texts = [text for one in rendered for text, is_plain in one.pieces if is_plain == plain]
            backend.encode_special_tokens = plain
            try:
                encoded[plain] = iter(backend.encode_batch(texts, add_special_tokens=False))
            finally:
                backend.encode_special_tokens = False
        for one in rendered:
            encodings = [next(encoded[is_plain]) for _, is_plain in one.pieces]
            yield Tokens(encodings, [text for text, _ in one.pieces])


def _kept(refuse: Callable[[DataError], None], make: Callable[..., Any], *columns: Iterable[Any]) -> Iterator[Any]:
    """What is made of each line of the columns, without those that are refused."""
    for line in zip(*columns, strict=True):
        try:
            made = make(*line)
        except PlacementError as error:
            refuse(line[0].row.error(str(error)))
        except DataError as error:
            refuse(error)
        else:
            yield made


def _measured(part: Mapping[str, Any], media: MediaEncoder, images: ImageSpec) -> Medium:
    """The medium of a part of a content.

    Raises:
        PictureError: it cannot be seen.
    """
    kind = "video" if "video" in part or part.get("type") == "video" else "image"
    value = next((part[key] for key in MEDIA if part.get(key) is not None), None)
    if value is None:
        msg = f"the part names no {kind}"
        raise PictureError(msg, '{"type": "image", "image": "cat.png"}')
    pictures = Pictures(
        root=None if images.root is None else Path(images.root), hosts=images.hosts, store=folder() / "images"
    )
    limits = media.limits(kind, least=images.min_pixels, most=images.max_pixels)
    if kind == "image":
        return media.measured(kind, [pictures.find(value)], limits)
    if not isinstance(value, list | tuple) or not value:
        msg = f"a video is a list of frames, got {value!r:.60}"
        raise PictureError(msg, '{"type": "video", "video": ["0.png", "1.png"], "fps": 2}')
    fps = part.get("fps", FPS)
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps < math.inf:
        msg = f"fps: expected a number above 0, got {fps!r:.60}"
        raise PictureError(msg, '"fps": 2')
    return media.measured(kind, [pictures.find(frame) for frame in value], limits, float(fps))


def _rendered(asked: _Asked, rendered: Rendered | PlacementError, template: ChatTemplate) -> _Rendered:
    if isinstance(rendered, PlacementError):
        raise rendered
    try:
        rendered.text.encode()
    except UnicodeEncodeError as error:
        msg = f"holds half of a surrogate pair, {rendered.text[error.start]!a}, which is no character"
        raise PlacementError(msg) from None
    if asked.said.text is not None:
        end = rendered.text[len(asked.said.text) :]
        return _Rendered(asked.row, asked.said, rendered, ((asked.said.text, bool(asked.spelt)), (end, False)))
    pieces = _apart(rendered, template.control_tokens) if asked.spelt else ((rendered.text, False),)
    apart = sum(len(template.control_tokens.findall(text)) for text, is_plain in pieces if is_plain)
    if apart < len(asked.spelt):
        where, token = asked.spelt[0]
        msg = f"{where} holds the control token {token} outside of its content"
        raise PlacementError(msg)
    return _Rendered(asked.row, asked.said, rendered, pieces, asked.media)


def _document(one: _Rendered, tokens: Tokens, data: DataSpec) -> Document:
    whole = one.conversation.text is not None
    ranges = [(0, len(one.rendered.text), 1.0)] if whole else trained_ranges(one.conversation, one.rendered, data)
    labels, weights = labels_of(tokens, ranges)
    ends = [tokens.beginning_at(turn.stop) for turn in one.rendered.turns.values() if turn.stop > turn.end]
    return Document(
        input_ids=tokens.ids,
        labels=labels,
        file=one.row.file,
        row=one.row.number,
        weights=weights,
        ends=np.sort(np.asarray(ends, dtype=np.int32)),
        lost=_lost(one.conversation, one.rendered),
    )


def _shown(
    document: Document,
    one: _Rendered,
    tokens: Tokens,
    *,
    end: str,
    media: Sequence[Medium],
    placeholders: VisionTokens | None,
) -> Iterator[ShownToken]:
    """Every token, with the role of its message; what stands between two ends belongs to one message.

    An image is one, and so is a video.
    """
    left = iter(media)
    stand_in = () if placeholders is None else (placeholders.image, placeholders.video)
    text, messages = one.rendered.text, one.conversation.messages
    turns = sorted(one.rendered.turns.values(), key=lambda turn: turn.start)
    bounds = []
    for turn, following in itertools.pairwise(turns):
        place = text.rfind(end, turn.stop, following.start) if end else -1
        bounds.append(turn.stop if place < 0 else place + len(end))
    roles = [messages[turn.message]["role"] for turn in turns] or ["text"]
    weights = np.where(document.labels == IGNORED, 0.0, 1.0 if document.weights is None else document.weights)
    message = 0
    lines = zip(tokens.ids.tolist(), [0.0, *weights[:-1].tolist()], tokens.texts(), strict=True)
    for token, weight, (character, shown) in lines:
        while message < len(bounds) and character >= bounds[message]:
            message += 1
        if token in stand_in:
            medium = next(left)
            count = len(medium.starts) * medium.frame_tokens
            yield ShownToken(f"[{medium.kind}, {count:,} tokens]", roles[message], 0.0, medium.pictures)
        else:
            yield ShownToken(shown, roles[message], weight)


def _lost(said: Conversation, rendered: Rendered) -> tuple[str, ...]:
    """What the template leaves out: reasoning of earlier turns, a system message that it does not know, tools."""
    lost = {
        kind if kind == "reasoning" else f"{kind} of the {said.messages[message]['role']}"
        for message, kind in rendered.lost
    }
    names = [tool.get("function", tool).get("name") for tool in said.tools or ()]
    if any(isinstance(name, str) and name not in rendered.text for name in names):
        lost.add("tools")
    return tuple(sorted(lost))


def _without_reasoning(said: Conversation) -> Conversation:
    """A conversation whose answers hold no reasoning, neither apart nor in front of ``</think>``."""
    messages = []
    for place, message in enumerate(said.messages):
        kept = {key: value for key, value in message.items() if key != "reasoning_content"}
        content = kept.get("content")
        if message["role"] == "assistant" and isinstance(content, str) and "reasoning_content" not in message:
            texts = texts_of(content, "assistant", reasons=not said.parts_of(place))
            if any(kind == "reasoning" for kind, _, _ in texts):
                kept["content"] = "".join(content[start:stop] for kind, start, stop in texts if kind == "content")
        messages.append(kept)
    return attrs.evolve(said, messages=tuple(messages))


def _spelt(said: Conversation, control_tokens: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """(where, control token) of each that a row spells: in a rendered text it would open or close a turn."""
    named: list[tuple[str, Any]] = [(f"a turn of role {message['role']}", message) for message in said.messages]
    for where, value in [*named, ("a tool", said.tools), ("the text", said.text)]:
        for text in _texts(value):
            for token in control_tokens.findall(text):
                yield where, token


def _apart(rendered: Rendered, control_tokens: re.Pattern[str]) -> tuple[tuple[str, bool], ...]:
    """The rendered text in pieces, the contents that spell control tokens apart from what stands between them."""
    pieces, done = [], 0
    for segment in rendered.segments:
        inside = rendered.text[segment.start : segment.stop]
        if control_tokens.search(inside):
            pieces += [(rendered.text[done : segment.start], False), (inside, True)]
            done = segment.stop
    return (*pieces, (rendered.text[done:], False))


def _texts(value: Any) -> Iterator[str]:
    """Every string in a value, the keys of its mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from value
        yield from _texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
