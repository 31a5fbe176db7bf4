"""The time of a step as a plan for this machine says it, against steps that are made, in one thread.

    python -m benchmarks.planned_time [--out benchmarks/results/planned_time.json]

The plan measures a short step of one layer of each kind, and counts the rest; the run is of packed conversations.
Its median step, with the shortest and the longest, is scaled to the tokens that the plan speaks of.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import qwenft as qf
from benchmarks.memory import SIZES
from qwenft.testing import tiny_checkpoint
from qwenft.testing.conversations import chitchat_messages

TOKENS, STEPS = 512, 6
CASES = (("dense", None), ("moe", None), ("large dense", None), ("large dense", "nf4"))


def compared(kind: str, quantized: str | None, folder: Path) -> dict[str, Any]:
    """What was planned and measured of one recipe."""
    checkpoint = folder / f"{kind}-{quantized}".replace(" ", "-")
    options: Any = {"vocabulary": 1024, "sizes": SIZES[kind]}
    tiny_checkpoint(checkpoint, kind.rpartition(" ")[2], **options)
    model = qf.ModelSpec(checkpoint, dtype="float32")
    rows = [{"messages": messages} for messages in chitchat_messages()[:200]]
    plan = qf.Recipe(
        model.quantize(quantized) if quantized else model,
        qf.DataSpec.messages(rows).with_max_length(TOKENS, overflow="truncate").pack(),
        qf.AdapterSpec.lora(rank=16),
    ).compile()
    start = time.perf_counter()
    planned = plan.time
    planning = time.perf_counter() - start
    prepared = plan.prepare()
    taken = []
    for step in list(prepared.batches())[:STEPS]:
        start = time.perf_counter()
        prepared.step(step)
        taken.append((time.perf_counter() - start) * planned.tokens / step[0].layout.total)
    return {
        "case": kind if quantized is None else f"{kind}, {quantized}",
        "planned_seconds": planned.step_seconds,
        "slower_than_counted": planned.slower,
        "measured_seconds": statistics.median(taken[1:]),
        "from": min(taken[1:]),
        "to": max(taken[1:]),
        "planning_seconds": planning,
    }


def main() -> None:
    """Compare all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, quantized in CASES:
            found.append(compared(kind, quantized, Path(folder)))
            print(
                "{case:<18} planned {planned_seconds:7.3f} s, measured {measured_seconds:7.3f} "
                "({from:.3f} to {to:.3f})".format(**found[-1]),
                flush=True,
            )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
