"""A long run takes no more memory and no more time a step than a short one."""

from __future__ import annotations

import statistics

import pytest

from .helpers import printed, recipe

# Prints the resident bytes of the process after every step, and the processor's seconds that each took as multiples of
# those of some layers of torch alone, which are measured beside every step: what else the machine does slows both.
SCRIPT = """
import array, json, sys, time
import torch
import qwenft as qf

plan = qf.Recipe.load(sys.argv[1]).compile()
held, ratios = array.array("q"), array.array("d")
layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(16)))
given, before = torch.randn(64, 64), time.process_time()

def on_step(record):
    global before
    after = time.process_time()
    for _ in range(4):
        layers(given).sum().backward()
    other = time.process_time()
    ratios.append((after - before) / (other - after))
    with open("/proc/self/statm") as file:
        held.append(4096 * int(file.read().split()[1]))
    before = time.process_time()

plan.train(sys.argv[2], verbose=0, on_step=on_step)
print(json.dumps([held.tolist(), ratios.tolist()]))
"""


@pytest.mark.parametrize("steps", [200, pytest.param(20_000, marks=pytest.mark.long)])
def test_memory_and_time_of_a_step_stay_flat(dense_checkpoint, tmp_path, steps):
    """The second tenth of a run and its last are compared: resident memory within 2 %, time of a step within 10 %."""
    asked = recipe(dense_checkpoint, max_steps=steps, save_every=steps // 10)
    asked.save(tmp_path / "recipe.json")
    held, ratios = printed("-c", SCRIPT, tmp_path / "recipe.json", tmp_path / "run")
    assert len(held) == steps
    tenth = steps // 10
    early, late = slice(tenth, 2 * tenth), slice(-tenth, None)
    assert statistics.median(held[late]) == pytest.approx(statistics.median(held[early]), rel=0.02)
    if steps > 1000:
        assert statistics.median(ratios[late]) == pytest.approx(statistics.median(ratios[early]), rel=0.10)
