"""Real conversations between people, of the package chitchat-dataset, as messages."""

from __future__ import annotations

import json
import random
from importlib.resources import files
from typing import Any

from qwenft.errors import DataError


def chitchat_messages() -> list[list[dict[str, Any]]]:
    """The conversations of two people, one the user and the other the assistant, in a fixed random order.

    Consecutive texts of one person are joined to one turn; who speaks first is the user.
    """
    try:
        rows = json.loads(files("chitchat_dataset").joinpath("dataset.json").read_text(encoding="utf-8"))
    except ModuleNotFoundError:
        raise DataError(
            "the conversations are in the package chitchat-dataset, which is not installed",
            fix='pip install "qwenft[examples]"',
        ) from None
    conversations = [_messages(value["messages"]) for value in rows.values()]
    conversations = [messages for messages in conversations if len(messages) > 1]
    random.Random(0).shuffle(conversations)
    return conversations


def _messages(turns: list[list[dict[str, Any]]]) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    speaker = None
    for text in (text for turn in turns for text in turn):
        if not text["text"].strip():
            continue
        if text["sender"] == speaker:
            messages[-1]["content"] += f" {text['text'].strip()}"
        else:
            role = "assistant" if messages and messages[-1]["role"] == "user" else "user"
            messages.append({"role": role, "content": text["text"].strip()})
            speaker = text["sender"]
    return messages


def pieces(messages: list[dict[str, Any]], characters: int = 500) -> list[list[dict[str, Any]]]:
    """A long conversation as several, each of whole exchanges and about so many characters."""
    found: list[list[dict[str, Any]]] = [[]]
    for user, assistant in zip(messages[::2], messages[1::2], strict=False):
        size = sum(len(message["content"]) for message in found[-1])
        if found[-1] and size + len(user["content"]) + len(assistant["content"]) > characters:
            found.append([])
        found[-1] += [user, assistant]
    return [piece for piece in found if piece]
