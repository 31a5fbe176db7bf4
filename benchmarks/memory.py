"""The peak of a step as plans simulate it, against what torch's profiler counts in the real step, on a CPU.

    python benchmarks/memory.py [--only TEXT] [--out benchmarks/results/memory.json]

Models of 5 to 300 million random weights, on packed rows of real conversations; a row of the table for each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import PIL.Image
import torch

import qwenft as qf
from qwenft.testing import TinySizes, measured_peak, tiny_checkpoint
from qwenft.testing.conversations import chitchat_messages

MIDDLE = {"hidden": 192, "ffn": 512, "layers": 16, "heads": 4, "head_dim": 64, "linear_head_dim": 32}
SIZES = {
    "dense": TinySizes(**MIDDLE),
    "moe": TinySizes(**MIDDLE, expert_ffn=64, experts=16),
    "vision": TinySizes(**MIDDLE, vision_hidden=96, vision_ffn=256, vision_depth=8, vision_heads=4),
    "large dense": TinySizes(hidden=1024, ffn=3072, layers=24, heads=8, head_dim=128, linear_head_dim=64),
}
LORA = qf.AdapterSpec.lora(rank=16)
FULL = qf.AdapterSpec.full()
METHODS = {"lora": LORA, "nf4 lora": LORA, "full": FULL}


@attrs.frozen
class Case:
    """A run.

    Args:
        kind: a key of SIZES.
        method: a key of METHODS.
        checkpointed: activation checkpointing.
        tokens: of a row, at most.
    """

    kind: str
    method: str
    checkpointed: bool
    tokens: int

    def __str__(self) -> str:
        kept = "checkpointed" if self.checkpointed else "kept"
        return f"{self.kind}, {self.method}, {kept}, {self.tokens}"


CASES = [
    *itertools.starmap(Case, itertools.product(("dense", "moe", "vision"), METHODS, (True, False), (128, 512))),
    *itertools.starmap(Case, itertools.product(("large dense",), METHODS, (True,), (512,))),
]


def recipe_of(case: Case, folder: Path) -> qf.Recipe:
    """The recipe of a case; its checkpoint and its images lie in a folder."""
    kind = case.kind.removeprefix("large ")
    checkpoint = folder / case.kind.replace(" ", "-")
    if not checkpoint.exists():
        options: Any = {"vocabulary": 1024, "sizes": SIZES[case.kind]}
        tiny_checkpoint(checkpoint, kind, **options)
    rows = [{"messages": messages} for messages in chitchat_messages()[:200]]
    if kind == "vision":
        rows = [seen(row, number, folder) for number, row in enumerate(rows)]
    data = qf.DataSpec.messages(rows).with_max_length(case.tokens, overflow="truncate").pack()
    model = qf.ModelSpec(checkpoint, dtype="float32")
    if kind == "vision":
        model, data = model.with_vision(), data.with_images(folder)
    model = model.quantize("nf4") if "nf4" in case.method else model
    training = qf.TrainingSpec(learning_rate=1e-4, max_steps=2, activation_checkpointing=case.checkpointed)
    return qf.Recipe(model, data, METHODS[case.method], training=training)


def seen(row: dict[str, Any], number: int, folder: Path) -> dict[str, Any]:
    """A conversation that begins with an image, each of a size of its own."""
    size = (64 + 32 * (number % 3), 64 + 32 * (number % 2))
    image = folder / f"{size[0]}-{size[1]}.png"
    if not image.exists():
        noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(image)
    first, *others = row["messages"]
    parts = [{"type": "image", "image": image.name}, {"type": "text", "text": first["content"]}]
    return {"messages": [{**first, "content": parts}, *others]}


def compared(case: Case, folder: Path) -> dict[str, Any]:
    """What was simulated and measured."""
    plan = recipe_of(case, folder).compile()
    prepared = plan.prepare()
    memory = plan.memory
    steps = list(prepared.batches())
    step = max(steps, key=lambda step: (step[0].layout.total, step[0].tokens))
    measured = measured_peak(prepared, step)
    parameters = sum(row.held for row in plan.coverage)
    return {
        "case": str(case),
        "parameters": parameters,
        "tokens": memory.tokens,
        "simulated": memory.peak_bytes,
        "measured": measured,
        "error": memory.peak_bytes / measured - 1,
    }


def main() -> None:
    """Run the cases, one after the other, in one thread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose names have this text")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if arguments.only in str(case):
                found.append(compared(case, Path(folder)))
                print(
                    "{case:<40} {parameters:>12,} {simulated:>14,} {measured:>14,} {error:+.2%}".format(
                        **found[-1]
                    )
                )
    errors = [abs(row["error"]) for row in found]
    print(f"{len(found)} runs: at most {max(errors):.2%}, median {statistics.median(errors):.2%}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
