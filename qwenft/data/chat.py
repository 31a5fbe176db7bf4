"""Conversations rendered by the checkpoint's own template and tokenised."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from jinja2.exceptions import TemplateError

from qwenft.data.masking import IGNORED, TurnMarks, labels_of, trained_spans
from qwenft.data.sources import Row, conversation, read_rows
from qwenft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qwenft.specs.data import DataSpec

_RENDERED_AT_ONCE = 1000  # conversations handed to the tokenizer's threads together


@attrs.frozen(eq=False)
class Document:
    """A tokenised conversation.

    Args:
        input_ids: [T] int32.
        labels: [T] int32: position t holds the token that it is trained to predict, or -100.
        file: where its row lies.
        row: its number there, counted from 1.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    file: str
    row: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        """How many positions are trained."""
        return int((self.labels != IGNORED).sum())

    def truncated(self, length: int) -> Document:
        """Its first ``length`` tokens; the last of them predicts nothing."""
        labels = self.labels[:length].copy()
        labels[-1] = IGNORED
        return attrs.evolve(self, input_ids=self.input_ids[:length], labels=labels)


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
        self.marks = self._turn_marks()

    def encode(self, data: DataSpec) -> Iterator[Document]:
        """The documents of a source, in its order, of any length.

        Raises:
            DataError: a row cannot be rendered; the error names file and row.
        """
        rows = read_rows(data)
        while chunk := list(itertools.islice(rows, _RENDERED_AT_ONCE)):
            yield from self._encode(chunk, data.column)

    def prompt(self, messages: list[dict[str, Any]], **template: Any) -> str:
        """The text that asks for an answer to ``messages``."""
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template)

    def _encode(self, rows: list[Row], column: str) -> Iterator[Document]:
        conversations = [conversation(row, column) for row in rows]
        texts = [self._render(row, messages) for row, messages in zip(rows, conversations, strict=True)]
        for row, messages, ids in zip(rows, conversations, self._tokenise(texts), strict=True):
            spans = trained_spans(ids, self.marks)
            turns = sum(message["role"] == "assistant" for message in messages)
            if len(spans) != turns:
                raise row.error(f"the chat template renders {len(spans)} of {turns} assistant turns")
            yield Document(
                input_ids=np.asarray(ids, dtype=np.int32),
                labels=np.asarray(labels_of(ids, spans), dtype=np.int32),
                file=row.file,
                row=row.number,
            )

    def _render(self, row: Row, messages: list[dict[str, Any]]) -> str:
        self._refuse_control_tokens(row, messages)
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, tools=row.values.get("tools"))
        except (TemplateError, TypeError, ValueError) as error:
            raise row.error(f"the checkpoint's chat template refuses it: {error}") from None

    def _refuse_control_tokens(self, row: Row, messages: list[dict[str, Any]]) -> None:
        """A turn that spells a turn mark would open or close turns of its own, and be trained as such."""
        for message in messages:
            for mark in ("<|im_start|>", "<|im_end|>"):
                if any(mark in text for text in _texts(message)):
                    raise row.error(
                        f"a turn of role {message['role']} holds the control token {mark}", "remove it"
                    )

    def _tokenise(self, texts: Iterable[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def _turn_marks(self) -> TurnMarks:
        question = [{"role": "user", "content": "?"}]
        asked = self.prompt(question)
        stated = self.tokenizer.apply_chat_template(question, tokenize=False)
        header, end, prompt = self._tokenise(["<|im_start|>assistant", "<|im_end|>", asked.removeprefix(stated)])
        return TurnMarks(header=tuple(header), end=end[0], prompt=tuple(prompt))


def _texts(value: Any) -> Iterator[str]:
    """Every string in a message, the keys of its mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from value
        yield from _texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
