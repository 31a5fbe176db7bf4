"""A long run takes no more memory and no more time a step than a short one."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

import pytest

from .helpers import recipe

# Prints the resident bytes of the process after every step, and the seconds of each.
SCRIPT = """
import json, sys
import qwenft as qf

plan = qf.Recipe.load(sys.argv[1]).compile()
held, seconds = [], []

def on_step(record):
    with open("/proc/self/statm") as file:
        held.append(4096 * int(file.read().split()[1]))
    seconds.append(record["seconds"])

plan.train(sys.argv[2], progress=False, on_step=on_step)
print(json.dumps([held, seconds]))
"""


@pytest.mark.parametrize("steps", [200, pytest.param(20_000, marks=pytest.mark.long)])
def test_memory_and_time_of_a_step_stay_flat(dense_checkpoint, tmp_path, steps):
    """Resident memory at the end is within 2 % of what it was after a tenth, and the time of a step within 10 %.

    Of each a tenth of the run is compared by its median: of memory behind the first tenth and at the end, of time
    likewise, where the slower of two quarters of a tenth may be what else the machine was doing.
    """
    asked = recipe(dense_checkpoint, max_steps=steps, save_every=steps // 10)
    asked.save(tmp_path / "recipe.json")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "recipe.json"), str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    held, seconds = json.loads(done.stdout.splitlines()[-1])
    assert len(held) == steps
    tenth = steps // 10
    early, late = (statistics.median(part) for part in (held[tenth : 2 * tenth], held[-tenth:]))
    assert late == pytest.approx(early, rel=0.02)
    if steps > 1000:
        early, late = (least(part) for part in (seconds[tenth : 2 * tenth], seconds[-tenth:]))
        assert late == pytest.approx(early, rel=0.10)


def least(seconds):
    """The time of a step in the quieter moments of a part: its lower quartile."""
    return statistics.quantiles(seconds, n=4)[0]
