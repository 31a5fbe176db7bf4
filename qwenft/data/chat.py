"""Conversations rendered by the checkpoint's own template and tokenised."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from qwenft.data.document import Document
from qwenft.data.formats import conversation
from qwenft.data.masking import IGNORED, Tokens, labels_of, trained_ranges
from qwenft.data.sources import read_rows
from qwenft.data.template import ChatTemplate, PlacementError, Rendered, texts_of
from qwenft.errors import DataError

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from qwenft.data.formats import Conversation
    from qwenft.data.sources import Row
    from qwenft.specs.data import DataSpec

_RENDERED_AT_ONCE = 1000  # conversations handed to the tokenizer's threads together


@attrs.frozen
class ShownToken:
    """A token as a person reads it.

    Args:
        text: what it stands for.
        role: of the message that it belongs to, with what the template writes around it.
        weight: in the loss; 0 where it is not trained.
    """

    text: str
    role: str
    weight: float


@attrs.frozen(eq=False)
class _Asked:
    """A row, what it says, and the control tokens that it spells: (where, token)."""

    row: Row
    said: Conversation
    spelt: tuple[tuple[str, str], ...]


@attrs.frozen(eq=False)
class _Rendered:
    """A row on its way: what it says and its rendered text, in pieces that are tokenised on their own."""

    row: Row
    conversation: Conversation
    rendered: Rendered
    pieces: tuple[tuple[str, bool], ...]  # (text, whether control tokens in it are plain text)


class ChatEncoder:
    """Rows to documents with a checkpoint's tokenizer.

    Args:
        tokenizer: transformers' tokenizer of the checkpoint, with its chat template.

    Raises:
        DataError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.chat_template is None:
            raise DataError("the checkpoint's tokenizer has no chat template", fix="add chat_template.jinja to it")
        self.tokenizer = tokenizer

    def template(self, options: Mapping[str, Any] | None = None) -> ChatTemplate:
        """The checkpoint's chat template with these options.

        Raises:
            DataError: it does not render a question and an answer.
        """
        try:
            return ChatTemplate(self.tokenizer, options or {})
        except PlacementError as error:
            raise DataError(
                f"a question and an answer: {error}", fix="another chat template, or other options of it"
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
        for document, (one, tokens) in self._encoded(data, skipped):
            yield list(_shown(document, one, tokens, end))

    def _encoded(
        self, data: DataSpec, skipped: list[DataError] | None, rows: Iterable[Row] | None = None
    ) -> Iterator[tuple[Document, tuple[_Rendered, Tokens]]]:
        template = self.template(data.template_options)

        def refuse(error: DataError) -> None:
            if skipped is None:
                raise error
            skipped.append(error)

        left = read_rows(data, refuse) if rows is None else iter(rows)
        while chunk := list(itertools.islice(left, _RENDERED_AT_ONCE)):
            asked = list(_kept(refuse, partial(_asked, data=data, template=template), chunk))
            texts = self._texts_of(asked, template)
            rendered = list(_kept(refuse, partial(_rendered, template=template), asked, texts))
            tokens = list(self._tokenise(rendered))
            yield from _kept(refuse, partial(_finished, data=data), rendered, tokens)

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


def _asked(row: Row, data: DataSpec, template: ChatTemplate) -> _Asked:
    said = conversation(row, data)
    if data.thinking == "drop":
        said = _without_reasoning(said)
    if any(isinstance(message.get("content"), list) for message in said.messages):
        raise row.error("holds an image or a video, which training on text does not show", "leave the row out")
    spelt = tuple(_spelt(said, template.control_tokens))
    if spelt and data.control_tokens == "refuse":
        where, token = spelt[0]
        raise row.error(
            f"{where} holds the control token {token}",
            'remove it, or .with_control_tokens("encode") to take it for plain text',
        )
    return _Asked(row, said, spelt)


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
    return _Rendered(asked.row, asked.said, rendered, pieces)


def _finished(one: _Rendered, tokens: Tokens, data: DataSpec) -> tuple[Document, tuple[_Rendered, Tokens]]:
    """A document, and what it was made of."""
    return _document(one, tokens, data), (one, tokens)


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


def _shown(document: Document, one: _Rendered, tokens: Tokens, end: str) -> Iterator[ShownToken]:
    """Every token, with the role of its message; what stands between two ends belongs to one message."""
    text, messages = one.rendered.text, one.conversation.messages
    turns = sorted(one.rendered.turns.values(), key=lambda turn: turn.start)
    bounds = []
    for turn, following in itertools.pairwise(turns):
        place = text.rfind(end, turn.stop, following.start) if end else -1
        bounds.append(turn.stop if place < 0 else place + len(end))
    roles = [messages[turn.message]["role"] for turn in turns] or ["text"]
    weights = np.where(document.labels == IGNORED, 0.0, 1.0 if document.weights is None else document.weights)
    message = 0
    for weight, (character, shown) in zip([0.0, *weights[:-1].tolist()], tokens.texts(), strict=True):
        while message < len(bounds) and character >= bounds[message]:
            message += 1
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
