"""A long run takes no more memory and no more time a step than a short one."""

from __future__ import annotations

import itertools
import statistics

import pytest

from .helpers import printed, recipe

# Prints the resident bytes of the process after every step, and the processor's seconds up to each: on a machine that
# does other things too, they tell more of a step than the clock.
SCRIPT = """
import json, sys, time
import qwenft as qf

plan = qf.Recipe.load(sys.argv[1]).compile()
held, seconds = [], []

def on_step(record):
    with open("/proc/self/statm") as file:
        held.append(4096 * int(file.read().split()[1]))
    seconds.append(time.process_time())

plan.train(sys.argv[2], verbose=0, on_step=on_step)
print(json.dumps([held, seconds]))
"""


@pytest.mark.parametrize("steps", [200, pytest.param(20_000, marks=pytest.mark.long)])
def test_memory_and_time_of_a_step_stay_flat(dense_checkpoint, tmp_path, steps):
    """The second tenth of a run and its last are compared: resident memory within 2 %, time of a step within 10 %."""
    asked = recipe(dense_checkpoint, max_steps=steps, save_every=steps // 10)
    asked.save(tmp_path / "recipe.json")
    held, seconds = printed("-c", SCRIPT, tmp_path / "recipe.json", tmp_path / "run")
    assert len(held) == steps
    tenth = steps // 10
    early, late = slice(tenth, 2 * tenth), slice(-tenth, None)
    assert statistics.median(held[late]) == pytest.approx(statistics.median(held[early]), rel=0.02)
    if steps > 1000:
        taken = [after - before for before, after in itertools.pairwise(seconds)]
        assert statistics.median(taken[late]) == pytest.approx(statistics.median(taken[early]), rel=0.10)
