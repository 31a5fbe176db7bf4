"""What the presets and every size of the family come to in simulation, and what simulating them takes.

    python benchmarks/presets.py [--only TEXT] [--out benchmarks/results/presets.json]

Rows of 2,048 tokens, one a step. Each is planned in a process of its own, whose time, from the start of Python on,
and whose memory the operating system tells. No GPU is needed, and none is measured: the figures are simulated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import attrs

import qwenft as qf
from qwenft.family.architectures import FAMILY
from qwenft.known_recipes import PRESETS

GIB = 2**30
#: Sizes that are no preset are planned as QLoRA on a card of this kind.
CARD = "H100-80GB"


def recipe_of(name: str) -> tuple[qf.Recipe, str]:
    """A preset and its machine, or QLoRA on a size of the family."""
    if name in PRESETS:
        return qf.preset(name), PRESETS[name].machine
    return qf.Recipe(qf.ModelSpec(name).quantize("nf4"), adapter=qf.AdapterSpec.lora(rank=16)), CARD


def planned(name: str) -> dict[str, object]:
    """What is said of a plan."""
    recipe, machine = recipe_of(name)
    plan = recipe.compile(qf.Machine.named(machine), strict=False)
    memory, time_of = plan.memory, plan.time
    return {
        "name": name,
        "machine": machine,
        "backends": {slot.name: slot.backend.name for slot in plan.draft.slots},
        "peak_gib": memory.peak_bytes / GIB,
        "needed_gib": memory.needed_bytes / GIB,
        "fits": plan.fits,
        "moment": memory.moment,
        "by_component_gib": {part: count / GIB for part, count in memory.by_component.items()},
        "least_step_seconds": time_of.step_seconds,
        "tokens": attrs.asdict(time_of)["tokens"],
    }


def in_a_process(name: str) -> dict[str, object]:
    """The same, with the time and the memory of the process that planned it."""
    start = time.monotonic()
    process = subprocess.Popen(  # noqa: S603 - our own file
        [sys.executable, "-W", "ignore", __file__, "--plan", name], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, name
    return {**json.loads(said), "seconds": time.monotonic() - start, "host_gb": usage.ru_maxrss * 1024 / 1e9}


def main() -> None:
    """Plan all of them, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that have this text")
    parser.add_argument("--plan", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.plan is not None:
        print(json.dumps(planned(arguments.plan)))
        return
    found = []
    for name in (*PRESETS, *FAMILY):
        if arguments.only in name:
            found.append(in_a_process(name))
            print(
                "{name:<26} {machine:<12} peak {peak_gib:6.2f} GiB, needed {needed_gib:6.2f}, fits {fits!s:<5} "
                "{seconds:5.1f} s, {host_gb:.2f} GB".format(**found[-1]),
                flush=True,
            )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
