"""What the tests of training share."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import qwenft as qf

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
#: What a record holds of time and machine, which no two runs share.
MEASURED = {"seconds", "compile_seconds", "tokens_per_second", "peak_bytes", "evaluation_seconds"}


def chats(count=20):
    """Questions with an answer each."""
    pairs = [(f"What follows {a} and {b}?", f"{b} {a} {b}.") for a in NUMBERS for b in NUMBERS if a != b]
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs[:: len(pairs) // count][:count]
    ]


def recipe(checkpoint, *, dtype="float32", adapter=None, held_out=None, packed=True, **training):
    """A small recipe."""
    data = qf.DataSpec.messages(chats()).with_max_length(128)
    data = data.pack() if packed else data
    return qf.Recipe(
        qf.ModelSpec(checkpoint, dtype=dtype),
        data if held_out is None else data.hold_out(held_out),
        qf.AdapterSpec.full() if adapter is None else adapter,
        training=qf.TrainingSpec(**{"learning_rate": 1e-3, **training}),
    )


def comparable(history):
    """The records without what time and machine decide."""
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in history]


def written(folder):
    """The records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    """Every parameter of a run's model, by name."""
    return {name: parameter.detach().clone() for name, parameter in run.prepared.model.named_parameters()}


def printed(*arguments, **environment):
    """The JSON value that a Python process of one thread prints last."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
