"""Rows of every format as conversations, checked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from qwenft.specs.data import ROLES, DataSpec

if TYPE_CHECKING:
    from qwenft.data.sources import Row

#: Names of roles in ShareGPT and its descendants, and what they are here.
ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "developer": "system",
}
MEDIA = ("image", "image_url", "video")
EXAMPLE = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}'


@attrs.frozen
class Training:
    """Whether a message, or a part of its content, is trained.

    Args:
        train: True, False, or None to leave it to ``train_on``.
        weight: of its tokens in the loss.
    """

    train: bool | None = None
    weight: float = 1.0


@attrs.frozen
class Conversation:
    """What a row says.

    Args:
        messages: as the template takes them: role, content and whatever else they hold.
        training: of each message.
        parts: of a message whose content came in parts that are images, or that say whether they are trained, the
            length of each in characters and its training.
        tools: JSON schemas of the tools, or None.
        text: in place of messages: plain text, trained whole.
    """

    messages: tuple[Mapping[str, Any], ...]
    training: tuple[Training, ...] = ()
    parts: Mapping[int, tuple[tuple[int, Training], ...]] = attrs.field(factory=dict)
    tools: list[Any] | None = None
    text: str | None = None

    def parts_of(self, message: int) -> list[int]:
        """The lengths of the parts of a message's content; none where it is one text."""
        return [length for length, _ in self.parts.get(message, ())]


def conversation(row: Row, data: DataSpec) -> Conversation:
    """The checked conversation of a row.

    Raises:
        DataError: a column is missing, or holds what its format does not; the error names file and row.
    """
    return _FORMATS[data.format](row, data.names)


def _messages(row: Row, names: Mapping[str, str]) -> Conversation:
    turns = _list(row, names, "messages")
    return _checked(row, names["messages"], turns, _tools(row, names), role="role", content="content")


def _conversations(row: Row, names: Mapping[str, str]) -> Conversation:
    role, content = names["role"], names["content"]
    turns = _list(row, names, "conversations")
    if system := row.values.get(names["system"]):
        turns.insert(0, {role: "system", content: system})
    return _checked(row, names["conversations"], turns, _tools(row, names), role=role, content=content)


def _prompt_completion(row: Row, names: Mapping[str, str]) -> Conversation:
    sides = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        said = _column(row, names, name)
        sides.append([{"role": role, "content": said}] if isinstance(said, str) else _list(row, names, name))
    prompt, completion = sides
    # A prompt of several turns holds answers too, which are trained where they say so themselves.
    asked = [
        {"train": False, **turn} if isinstance(turn, Mapping) and turn.get("role") == "assistant" else turn
        for turn in prompt
    ]
    return _checked(
        row, names["prompt"], [*asked, *completion], _tools(row, names), role="role", content="content"
    )


def _alpaca(row: Row, names: Mapping[str, str]) -> Conversation:
    asked = _string(row, names, "instruction")
    if row.values.get(names["input"]):
        asked = f"{asked}\n\n{_string(row, names, 'input')}"
    answer = _string(row, names, "output")
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    if system := row.values.get(names["system"]):
        turns.insert(0, {"role": "system", "content": system})
    return _checked(row, names["instruction"], turns, None, role="role", content="content")


def _text(row: Row, names: Mapping[str, str]) -> Conversation:
    text = _string(row, names, "text")
    if not text:
        raise row.error(f"{names['text']!r}: expected a text, got an empty one", "leave the row out")
    return Conversation(messages=(), text=text)


_FORMATS: dict[str, Callable[[Row, Mapping[str, str]], Conversation]] = {
    "messages": _messages,
    "conversations": _conversations,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _text,
}


def _column(row: Row, names: Mapping[str, str], name: str) -> Any:
    """What a row holds for ``name``, which a format reads and which may be called otherwise there."""
    if names[name] not in row.values:
        known = ", ".join(map(repr, row.values)) or "none"
        problem = f"expected a column {names[name]!r}, got {known}"
        raise row.error(problem, f'.with_columns({name}="your_column")')
    return row.values[names[name]]


def _list(row: Row, names: Mapping[str, str], name: str) -> list[Any]:
    turns, column = _column(row, names, name), names[name]
    if not isinstance(turns, list | tuple) or not turns:
        got = "an empty conversation" if turns in ([], ()) else f"{type(turns).__name__} {turns!r:.60}"
        raise row.error(f"{column!r}: expected a list of messages, got {got}", EXAMPLE)
    return list(turns)


def _string(row: Row, names: Mapping[str, str], name: str) -> str:
    value = _column(row, names, name)
    if not isinstance(value, str):
        raise row.error(f"{names[name]!r}: expected a string, got {value!r:.60}", "a text in every row")
    return value


def _tools(row: Row, names: Mapping[str, str]) -> list[Any] | None:
    tools = row.values.get(names["tools"])
    if isinstance(tools, str):
        tools = _json(row, names["tools"], tools)
    if not tools:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise row.error(f"{names['tools']!r}: expected a list of JSON schemas, got {tools!r:.60}", "mappings")
    return list(tools)


def _checked(
    row: Row, column: str, turns: list[Any], tools: list[Any] | None, *, role: str, content: str
) -> Conversation:
    messages, training, parts = [], [], {}
    called = False
    for place, turn in enumerate(turns):
        message = _message(row, f"{column}[{place}]", turn, role=role, content=content)
        if message["role"] == "tool" and not called:
            raise row.error(f"{column}[{place}]: the result of a tool without a call before it", "add tool_calls")
        called = called or bool(message.get("tool_calls")) or "<tool_call>" in str(message["content"])
        train, weight = message.pop("train", None), message.pop("weight", None)
        training.append(_training(row, f"{column}[{place}]", train, weight))
        if isinstance(message["content"], list):
            found = _parts(row, f"{column}[{place}].content", message["content"])
            if any("text" not in part for part in message["content"]):
                parts[place] = found
            else:
                message["content"] = "".join(part["text"] for part in message["content"])
                if any(one != Training() for _, one in found):
                    parts[place] = found
        messages.append(message)
    return Conversation(tuple(messages), tuple(training), parts, tools)


def _message(row: Row, where: str, turn: Any, *, role: str, content: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise row.error(f"{where}: expected a mapping with {role} and {content}, got {turn!r:.60}", EXAMPLE)
    named = turn.get(role)
    known = named if named in ROLES else ROLE_NAMES.get(named) if isinstance(named, str) else None
    if known is None:
        raise row.error(f"{where}: expected a role of {', '.join(ROLES)}, got {named!r:.60}", EXAMPLE)
    rest = {key: value for key, value in turn.items() if value is not None and key not in {role, content}}
    message: dict[str, Any] = {"role": known, "content": turn.get(content), **rest}
    if named in {"function_call", "tool_call"}:
        message["tool_calls"], message["content"] = _json(row, f"{where}.{content}", message["content"]), ""
        if isinstance(message["tool_calls"], Mapping):
            message["tool_calls"] = [message["tool_calls"]]
    if "tool_calls" in message:
        message["tool_calls"] = _calls(row, f"{where}.tool_calls", known, message["tool_calls"])
    said = message["content"]
    if not isinstance(said, str | list | tuple) and not (said is None and message.get("tool_calls")):
        raise row.error(f"{where}.{content}: expected a string, got {said!r:.60}", EXAMPLE)
    reasoning = message.get("reasoning_content", "")
    if not isinstance(reasoning, str):
        raise row.error(f"{where}.reasoning_content: expected a string, got {reasoning!r:.60}", "a text, or none")
    return message


def _calls(row: Row, where: str, role: str, calls: Any) -> list[Any]:
    """Tool calls whose arguments are mappings, as templates want them; APIs give arguments as JSON strings."""
    if role != "assistant":
        raise row.error(f"{where}: only an assistant calls tools, got a {role}", "remove it")
    if isinstance(calls, str):
        calls = _json(row, where, calls)
    if not isinstance(calls, list | tuple):
        raise row.error(f"{where}: expected a list of calls, got {calls!r:.60}", _CALL)
    parsed = []
    for place, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise row.error(f"{where}[{place}]: expected a call that names a function, got {call!r:.60}", _CALL)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _json(row, f"{where}[{place}].arguments", arguments) if arguments.strip() else {}
        if arguments is not None and not isinstance(arguments, Mapping):
            raise row.error(f"{where}[{place}].arguments: expected an object, got {arguments!r:.60}", _CALL)
        named = {**function} if arguments is None else {**function, "arguments": arguments}
        parsed.append({**call, "function": named} if "function" in call else named)
    return parsed


_CALL = '{"type": "function", "function": {"name": "clock", "arguments": {"city": "Paris"}}}'


def _parts(row: Row, where: str, content: list[Any]) -> tuple[tuple[int, Training], ...]:
    """The characters and the training of each part of a content: texts, images and videos."""
    found = []
    for place, part in enumerate(content):
        is_media = isinstance(part, Mapping) and any(kind in part or part.get("type") == kind for kind in MEDIA)
        if not is_media and not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
            expected = '{"type": "text", "text": ...}'
            raise row.error(f"{where}[{place}]: expected {expected}, got {part!r:.60}", EXAMPLE)
        training = _training(row, f"{where}[{place}]", part.get("train"), part.get("weight"))
        found.append((len(part.get("text", "")), training))
    return tuple(found)


def _training(row: Row, where: str, train: Any, weight: Any) -> Training:
    if train is not None and not isinstance(train, bool):
        raise row.error(f"{where}.train: expected true or false, got {train!r:.60}", '"train": false')
    if weight is None:
        return Training(train)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise row.error(f"{where}.weight: expected a number of at least 0, got {weight!r:.60}", '"weight": 0.5')
    return Training(train, float(weight))


def _json(row: Row, where: str, text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise row.error(f"{where}: is no JSON: {error}", "a JSON object, or a mapping") from None
