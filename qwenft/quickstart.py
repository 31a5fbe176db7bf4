"""From nothing to a trained Qwen3.5 on a laptop: ``python -m qwenft.quickstart``.

Real conversations between people (the package chitchat-dataset) become messages; a tokenizer and a tiny base are
made; the base is trained in full on one half of them, then a LoRA on another slice. With ``--data`` and
``--model`` the same is done with your own.
"""

from __future__ import annotations

import argparse
import json
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import qwenft as qf
from qwenft.data.formats import conversation
from qwenft.data.sources import read_rows
from qwenft.errors import DataError
from qwenft.testing.checkpoint import TinySizes, tiny_checkpoint

ROW_TOKENS = 1024
QUESTIONS = ("Hi, how are you?", "What did you do today?", "Do you like music?")
_SIZES = TinySizes(hidden=128, ffn=320, linear_head_dim=32, initializer_range=0.02)


def chitchat_messages() -> list[list[dict[str, Any]]]:
    """The conversations of two people, one the user and the other the assistant, in a fixed random order.

    Consecutive texts of one person are joined to one turn; who speaks first is the user.
    """
    try:
        rows = json.loads(files("chitchat_dataset").joinpath("dataset.json").read_text(encoding="utf-8"))
    except ModuleNotFoundError:
        raise DataError(
            "the conversations of the quickstart are in the package chitchat-dataset, which is not installed",
            fix='pip install "qwenft[examples]", or --data your.jsonl',
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


def read_messages(path: Path) -> list[list[dict[str, Any]]]:
    """The conversations of a JSONL file of your own, checked."""
    data = qf.DataSpec.messages(path)
    return [[dict(message) for message in conversation(row, data).messages] for row in read_rows(data)]


def is_brief(messages: list[dict[str, Any]], characters: int = 40) -> bool:
    """Whether every answer takes a few words only: a manner that an adapter can learn."""
    return all(len(m["content"]) <= characters for m in messages if m["role"] == "assistant")


def write_rows(path: Path, conversations: list[list[dict[str, Any]]]) -> Path:
    """Write conversations as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as lines:
        for messages in conversations:
            lines.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


def free_folder(wanted: Path) -> Path:
    """``wanted``, or the first of ``wanted-2``, ``wanted-3`` ... that nothing is in: an earlier run is kept."""
    number, path = 1, wanted
    while path.exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return path


def data_spec(path: Path, held_out: float, *, own: bool) -> qf.DataSpec:
    """Packed conversations with some held out; short ones, for a tiny model, unless they are your own."""
    length, row_tokens = (2048, 2048) if own else (256, ROW_TOKENS)
    return qf.DataSpec.messages(path).with_max_length(length).pack(row_tokens=row_tokens).hold_out(held_out)


def train(title: str, recipe: qf.Recipe, folder: Path) -> qf.Run:
    """Compile, show the plan, and train."""
    print(f"\n{title}\n{'=' * len(title)}")
    plan = recipe.compile()
    _ = plan.data
    print(plan.explain(), flush=True)
    run = plan.train(folder)
    (_, before), (_, after) = run.held_out_losses[0], run.held_out_losses[-1]
    print(f"held-out loss {before:.3f} before, {after:.3f} after")
    return run


def make_base(folder: Path, conversations: list[list[dict[str, Any]]], steps: int, *, own: bool) -> Path:
    """A tokenizer and a tiny base, trained in full on these conversations."""
    texts = [message["content"] for messages in conversations for message in messages]
    rows = write_rows(folder / "data" / "base.jsonl", conversations)
    untrained = tiny_checkpoint(folder / "untrained", texts=texts, vocabulary=2048, sizes=_SIZES)
    data = data_spec(rows, 0.02, own=own)
    recipe = qf.Recipe(
        qf.ModelSpec(untrained, dtype="float32"),
        data,
        qf.AdapterSpec.full(),
        training=qf.TrainingSpec(
            max_steps=steps,
            tokens_per_step=data.capacity,
            learning_rate=1e-2,
            weight_decay=0.01,
            activation_checkpointing=False,
            evaluate_every=max(1, steps // 5),
        ),
    )
    return train("A tiny base, trained in full", recipe, folder / "base").folder / "model"


def main(arguments: list[str] | None = None) -> None:
    """Run the quickstart."""
    options = _parse(arguments)
    folder = free_folder(Path(options.run_dir))
    own = options.data is not None
    title = "A LoRA on your conversations" if own else "A LoRA on other conversations, with brief answers"
    conversations = read_messages(Path(options.data)) if own else chitchat_messages()
    if not own:
        conversations = [piece for messages in conversations for piece in pieces(messages)]
    model, dtype, learning_rate = options.model, "bfloat16", 2e-4
    if model is None:
        half = len(conversations) // 2
        model = make_base(folder, conversations[:half], options.base_steps, own=own)
        dtype, learning_rate, conversations = "float32", 5e-3, conversations[half:]
    if not own:
        conversations = [messages for messages in conversations if is_brief(messages)]
    rows = write_rows(folder / "data" / "adapter.jsonl", conversations)
    recipe = qf.Recipe(
        qf.ModelSpec(model, dtype=dtype),
        data_spec(rows, 0.05, own=own),
        qf.AdapterSpec.lora(rank=16, alpha=32),
        training=qf.TrainingSpec(max_steps=options.steps, learning_rate=learning_rate),
    )
    run = train(title, recipe, folder / "adapter-run")
    print("\nSample answers")
    sampling: dict[str, Any] = {"max_new_tokens": 40, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    for question in QUESTIONS:
        print(f"  user      {question}")
        print(f"  base      {run.generate(question, base=True, **sampling)}")
        print(f"  adapter   {run.generate(question, **sampling)}")
    print(f"\nEverything lies in {folder}; the adapter, for stock peft, in {run.adapter_path}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m qwenft.quickstart", description=__doc__)
    parser.add_argument("--data", help="a JSONL file of conversations instead of chitchat-dataset")
    parser.add_argument("--model", help="a checkpoint folder or hub id instead of the tiny base")
    parser.add_argument("--run-dir", default="runs/quickstart", help="where everything is left")
    parser.add_argument("--base-steps", type=int, default=1000, help="steps that the tiny base is trained")
    parser.add_argument("--steps", type=int, default=100, help="steps that the adapter is trained")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
