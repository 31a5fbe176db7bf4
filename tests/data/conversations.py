"""Conversations as people have them, made from a seed, and what of each a model is to write."""

from __future__ import annotations

import json
import random

from qwenft.data.masking import IGNORED

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Gives the {name}.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
    for name in ("weather", "time")
]
WORDS = [
    "the",
    "a",
    "of",
    "and",
    "answer",
    "question",
    "Sunny.",
    "42",
    "naïve",
    "café",
    "天气",
    "很好",
    "привет",
    "мир",
    "שלום",
    "नमस्ते",
    "🙂",
    "👩\u200d👩\u200d👧",
    "é",
    "\u2028",
    "<b>bold</b>",
    "{{x}}",
    "{%if%}",
    "&amp;",
    "\\n",
    "'quoted'",
    '"twice"',
    "`code`",
    "$x^2$",
    "assistant",
    "user",
    "system",
    "<tool_call",
    "im_start",
    "think",
    "http://a.b/c?d=e#f",
    "--",
    "...",
    "1,000.5",
    "\t",
]


def said(random_, most=30):
    """A text without whitespace at its ends, which may hold line breaks and blank lines."""
    words = random_.choices([word for word in WORDS if word.strip()], k=random_.randint(1, most))
    return "".join(word + random_.choice([" ", " ", " ", "\n", "\n\n", "  "]) for word in words).strip()


def conversation(seed, *, tools=True, reasoning=True, system=True):
    """The row of a conversation: several exchanges, some with reasoning, calls of tools and their results.

    Args:
        seed: gives the same row again.
        tools: whether there may be any.
        reasoning: whether answers may hold it.
        system: whether a system message may stand first.
    """
    random_ = random.Random(seed)
    messages = []
    if system and random_.random() < 0.5:
        messages.append({"role": "system", "content": said(random_)})
    with_tools = tools and random_.random() < 0.5
    for _ in range(random_.randint(1, 4)):
        messages.append({"role": "user", "content": f"{random_.choice(['', ' ', chr(10)])}{said(random_)}"})
        while with_tools and random_.random() < 0.5:
            calls = [call(random_) for _ in range(random_.randint(1, 2))]
            content = random_.choice(["", said(random_, 5)])
            messages.append(
                {**thoughts(random_, reasoning), "role": "assistant", "content": content, "tool_calls": calls}
            )
            messages += [{"role": "tool", "content": said(random_, 8)} for _ in calls]
        end = random_.choice(["", "\n", "  "])
        messages.append({**thoughts(random_, reasoning), "role": "assistant", "content": said(random_) + end})
    return {"messages": messages, **({"tools": TOOLS} if with_tools else {})}


def thoughts(random_, reasoning):
    return {"reasoning_content": said(random_)} if reasoning and random_.random() < 0.4 else {}


def call(random_):
    arguments = {"place": said(random_, 4), "days": random_.randint(1, 9), "more": {"a": [1, "b"]}}
    function = {"name": random_.choice(["weather", "time"]), "arguments": arguments}
    if random_.random() < 0.5:
        function["arguments"] = json.dumps(arguments)
    return {"type": "function", "function": function}


def runs_of(encoder, labels):
    """The text of each run of labels."""
    texts, run = [], []
    for label in [*labels.tolist(), IGNORED]:
        if label != IGNORED:
            run.append(label)
        elif run:
            texts.append(encoder.tokenizer.decode(run, skip_special_tokens=False))
            run = []
    return texts
