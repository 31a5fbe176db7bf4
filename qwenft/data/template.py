"""A checkpoint's chat template: what it makes of a conversation, and where each message stands in that.

Nothing here knows how a template writes. A conversation is rendered twice, once as it is and once with a mark on
either side of every text that a message holds; where the marked text without its marks is the plain one, the marks
tell where each text stands. How a turn of the assistant begins and ends is read off the template's own generation
prompt and off an answer that it renders.
"""

from __future__ import annotations

import itertools
import operator
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from qwenft.data.formats import Conversation

# Of letters and digits, which no template trims or escapes.
_MARK = "qwenftMark"
_WRAPPED = re.compile(r"\s*<(\w+)>\s*(.*?)\s*</\1>\s*", re.DOTALL)
_THOUGHT = re.compile(r"(?:\s*<think>)?(.*?)</think>(.*)", re.DOTALL)
_THOUGHT_ENDS = re.compile(r"\s*</think>\s*")
_PIECES = re.compile(r"<[^<>\s]*>|\w+|.", re.DOTALL)  # "<think>" and "<tool_call>" share nothing
_NO_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")


class PlacementError(ValueError):
    """The template refuses a conversation, or what it writes cannot be told apart."""


@attrs.frozen
class Segment:
    """A text of a message, as it stands in the rendered conversation.

    Args:
        message: which.
        kind: "reasoning", "content", or "call" for the name of a called tool.
        part: of the content, where that is a list of parts.
        start: its first character.
        stop: the one behind its last.
    """

    message: int
    kind: str
    part: int
    start: int
    stop: int


@attrs.frozen
class Turn:
    """What a message's author wrote, as characters of the rendered conversation: four pieces in this order.

    Args:
        message: which.
        start: where the assistant begins to write, behind the generation prompt; of others, where the text begins.
        thought: behind the reasoning and its tags.
        spoken: behind the content.
        end: behind the tool calls.
        stop: behind the end of the turn.
    """

    message: int
    start: int
    thought: int
    spoken: int
    end: int
    stop: int


@attrs.frozen
class Rendered:
    """A conversation as the model will meet it.

    Args:
        text: the template's own.
        segments: where the texts of the messages stand in it, in this order.
        turns: by message; a message without a text has none.
        lost: (message, kind) of the texts that the template leaves out.
    """

    text: str
    segments: tuple[Segment, ...]
    turns: Mapping[int, Turn]
    lost: tuple[tuple[int, str], ...]


class _Text(NamedTuple):
    message: int
    kind: str
    part: int


class _Marked(NamedTuple):
    """Messages with marks, and what they mark in the order of the marks' numbers."""

    mark: str
    messages: list[dict[str, Any]]
    texts: list[_Text]


class ChatTemplate:
    """The chat template of a tokenizer, with the options that are passed to it.

    Args:
        tokenizer: transformers' tokenizer of the checkpoint.
        options: of the template, such as ``enable_thinking``.

    Attributes:
        prompt: what it writes to ask for an answer.
        control_tokens: matches what would open or close turns if a row spelt it.
        end: what it writes behind an answer, up to the control token that ends the turn; empty if there is none.
        end_token: that token, or None.

    Raises:
        PlacementError: the template does not render a question and an answer.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._options = dict(options)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.control_tokens = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        question = [{"role": "user", "content": "?"}]
        stated = self._render(question)
        asked = self._render(question, add_generation_prompt=True)
        self.prompt = asked[_shared(stated, asked) :]
        self._header = self.prompt[: self.prompt.find("\n") + 1] or self.prompt
        answered = self._render([*question, {"role": "assistant", "content": _MARK}])
        behind = answered.rpartition(_MARK)[2]
        ending = self.control_tokens.search(behind)
        self.end = behind[: ending.end()] if ending else ""
        self.end_token = ending[0] if ending else None

    def ask(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The text that asks for an answer to ``messages``."""
        return self._render(messages, add_generation_prompt=True, **options)

    def render(self, conversations: Sequence[Conversation]) -> list[Rendered | PlacementError]:
        """Render conversations and find their messages.

        Returns:
            For each, what it gives, or the error of one that the template refuses, repeats a text of, or writes
            otherwise when it is marked.
        """
        found: list[Any] = self._render_all([(one.messages, one.tools) for one in conversations])
        whole = [number for number, text in enumerate(found) if isinstance(text, str)]
        marked = [_mark(conversations[number], found[number]) for number in whole]
        texts = self._render_all(
            [(one.messages, conversations[number].tools) for number, one in zip(whole, marked, strict=True)]
        )
        for number, one, text in zip(whole, marked, texts, strict=True):
            try:
                found[number] = self._placed(conversations[number], found[number], one, text)
            except PlacementError as error:
                found[number] = error
        return found

    def _placed(
        self, conversation: Conversation, plain: str, marked: _Marked, text: str | PlacementError
    ) -> Rendered:
        if isinstance(text, PlacementError):
            raise text
        without, found = _without_marks(text, marked.mark, len(marked.texts))
        if without != plain:
            place = _shared(without, plain)
            msg = (
                "the chat template writes another text when the messages are marked, from "
                f"{plain[max(place - 20, 0) : place + 20]!r} on: where they stand cannot be told"
            )
            raise PlacementError(msg)
        segments, lost = [], []
        for what, (starts, stops) in zip(marked.texts, found, strict=True):
            if not starts and not stops:
                lost.append((what.message, what.kind))
            elif len(starts) == len(stops) == 1:
                segments.append(Segment(*what, starts[0], stops[0]))
            else:
                msg = f"the chat template repeats or cuts the {what.kind} of message {what.message + 1}"
                raise PlacementError(msg)
        segments.sort(key=lambda segment: segment.start)
        return Rendered(plain, tuple(segments), self._turns(plain, segments, conversation), tuple(lost))

    def _turns(self, text: str, segments: Sequence[Segment], conversation: Conversation) -> dict[int, Turn]:
        """The turns of all messages that have a segment; linear in their number."""
        runs: list[list[Segment]] = []
        for segment in segments:
            if runs and runs[-1][0].message == segment.message:
                runs[-1].append(segment)
            else:
                runs.append([segment])
        if len({run[0].message for run in runs}) != len(runs):
            raise PlacementError("the chat template mixes the texts of different messages")
        turns = {}
        behind = 0
        for number, run in enumerate(runs):
            ahead = runs[number + 1][0].start if number + 1 < len(runs) else len(text)
            message = run[0].message
            if conversation.messages[message]["role"] == "assistant":
                turns[message] = self._answer(text, run, behind, ahead)
            else:
                start, end = run[0].start, run[-1].stop
                stop = end + len(self.end) if text.startswith(self.end, end) else end
                turns[message] = Turn(message, start, start, end, end, stop)
            behind = run[-1].stop
        return turns

    def _answer(self, text: str, run: Sequence[Segment], behind: int, ahead: int) -> Turn:
        """The turn of the assistant whose texts are ``run``, between those of the messages around it."""
        first, last = run[0].start, run[-1].stop
        of_kind = {kind: [segment for segment in run if segment.kind == kind] for kind in _KINDS}
        header = text.rfind(self._header, behind, first) if self._header else -1
        start = first
        if header >= 0:
            start = header
            for piece in _PIECES.findall(self.prompt):
                if not text.startswith(piece, start, first):
                    break
                start += len(piece)
            if not of_kind["reasoning"] and (empty := _NO_THOUGHT.match(text, header + len(self._header), first)):
                start = max(start, empty.end())
        end = text.find(self.end, last, ahead) if self.end else -1
        if of_kind["call"] and (end < 0 or (header < 0 and first == of_kind["call"][0].start)):
            msg = f"where the tool calls of message {run[0].message + 1} begin and end cannot be told"
            raise PlacementError(msg)
        thought = start
        if of_kind["content"] and of_kind["reasoning"]:
            thought = of_kind["content"][0].start
        elif of_kind["reasoning"]:
            reasoned = of_kind["reasoning"][-1].stop
            closed = _THOUGHT_ENDS.match(text, reasoned)
            thought = closed.end() if closed else reasoned
        stop = end + len(self.end) if end >= 0 else last
        end = end if end >= 0 else last
        spoken = end
        if of_kind["call"]:
            spoken = of_kind["content"][-1].stop if of_kind["content"] else thought
        return Turn(run[0].message, start, thought, spoken, end, stop)

    def _render_all(self, asked: Sequence[tuple[Sequence[Mapping[str, Any]], Any]]) -> list[str | PlacementError]:
        """The texts of (messages, tools), those with the same tools together, or the errors of those refused."""
        texts: list[str | PlacementError] = []
        for tools, run in itertools.groupby(asked, key=operator.itemgetter(1)):
            batch = [list(messages) for messages, _ in run]
            try:
                texts += self._apply(batch, tools)
            except PlacementError:
                texts += [self._tried(messages, tools) for messages in batch]
        return texts

    def _tried(self, messages: list[Mapping[str, Any]], tools: Any) -> str | PlacementError:
        try:
            return self._apply([messages], tools)[0]
        except PlacementError as error:
            return error

    def _render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        return self._apply([list(messages)], None, **options)[0]

    def _apply(self, batch: list[list[Mapping[str, Any]]], tools: Any, **options: Any) -> list[str]:
        try:
            return list(
                self._tokenizer.apply_chat_template(
                    batch, tools=tools, tokenize=False, **{**self._options, **options}
                )
            )
        except Exception as error:  # a template is code of somebody else's, in jinja's sandbox
            msg = f"the checkpoint's chat template refuses it: {error}"
            raise PlacementError(msg) from error


_KINDS = ("reasoning", "content", "call")


def _shared(left: str, right: str) -> int:
    """How many characters two texts begin with together."""
    differs = (place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(differs, min(len(left), len(right)))


def texts_of(content: str, role: str, *, reasons: bool) -> list[tuple[str, int, int]]:
    """(kind, start, stop) of the texts in a content, without the whitespace around them.

    The tags that wrap the whole content of a user or a tool belong to none: templates look for them at its ends.

    Args:
        content: of a message.
        role: of the message.
        reasons: the reasoning stands in the content, in front of ``</think>``.
    """
    if reasons and (thought := _THOUGHT.fullmatch(content)):
        found = [("reasoning", *thought.span(1)), ("content", *thought.span(2))]
    elif role != "assistant" and (wrapped := _WRAPPED.fullmatch(content)):
        found = [("content", *wrapped.span(2))]
    else:
        found = [("content", 0, len(content))]
    texts = []
    for kind, start, stop in found:
        inside = content[start:stop]
        left = start + len(inside) - len(inside.lstrip())
        texts.append((kind, left, max(left, start + len(inside.rstrip()))))
    return [text for text in texts if text[1] < text[2]]


def _mark(conversation: Conversation, plain: str) -> _Marked:
    """Put marks that do not stand in the plain text around the texts of the messages."""
    mark = _MARK
    while mark in plain:
        mark += "q"
    texts: list[_Text] = []

    def around(text: str, *what: Any) -> str:
        texts.append(_Text(*what))
        return f"{mark}{len(texts) - 1}b{text}{mark}{len(texts) - 1}e"

    messages = []
    for number, original in enumerate(conversation.messages):
        message = dict(original)
        reasoning = message.get("reasoning_content")
        if isinstance(reasoning, str) and reasoning.strip():
            inside = reasoning.strip()
            message["reasoning_content"] = reasoning.replace(inside, around(inside, number, "reasoning", 0), 1)
        content = message.get("content")
        if isinstance(content, str):
            reasons = message["role"] == "assistant" and not isinstance(reasoning, str)
            pieces, done = [], 0
            for kind, start, stop in texts_of(content, message["role"], reasons=reasons):
                for part, first, last in _parts(conversation.parts_of(number), start, stop):
                    pieces += [content[done:first], around(content[first:last], number, kind, part)]
                    done = last
            message["content"] = "".join([*pieces, content[done:]])
        elif isinstance(content, list):  # of texts and images
            message["content"] = [
                {**part, "text": text.replace(text.strip(), around(text.strip(), number, "content", place), 1)}
                if (text := part.get("text", "")).strip()
                else part
                for place, part in enumerate(content)
            ]
        if message.get("tool_calls"):
            message["tool_calls"] = [
                _marked_call(call, lambda name, place=number: around(name, place, "call", 0))
                for call in message["tool_calls"]
            ]
        messages.append(message)
    return _Marked(mark, messages, texts)


def _parts(lengths: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(part, first, last) of what lies between ``start`` and ``stop`` of parts of these lengths."""
    if not lengths:
        yield 0, start, stop
    behind = 0
    for part, length in enumerate(lengths):
        first, last = max(start, behind), min(stop, behind + length)
        if first < last:
            yield part, first, last
        behind += length


def _marked_call(call: Mapping[str, Any], around: Any) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, dict):
        return {**call, "function": {**function, "name": around(function["name"])}}
    return {**call, "name": around(call["name"])}


def _without_marks(text: str, mark: str, count: int) -> tuple[str, list[tuple[list[int], list[int]]]]:
    """The text without marks, and the places where each text begins and ends in it."""
    places: list[tuple[list[int], list[int]]] = [([], []) for _ in range(count)]
    pieces, done, length = [], 0, 0
    for found in re.finditer(rf"{mark}(\d+)([be])", text):
        pieces.append(text[done : found.start()])
        length += found.start() - done
        done = found.end()
        places[int(found[1])][found[2] == "e"].append(length)
    return "".join([*pieces, text[done:]]), places
