"""A step that finds too little memory says which, beside what was planned."""

from __future__ import annotations

import json

import pytest
import torch

import qwenft as qf
from qwenft.training.memory_use import is_shortage

from .helpers import chats, printed, recipe

# Before the first step the process gets so much address space as it has, and a little more.
SCRIPT = """
import json, resource, sys
import qwenft as qf

def limit(_record):
    with open("/proc/self/statm") as file:
        held = 4096 * int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (held + 100 * 2**20, resource.RLIM_INFINITY))

plan = qf.Recipe.load(sys.argv[1]).compile()
plan.memory
try:
    plan.train(sys.argv[2], verbose=0, on_evaluate=limit)
except qf.OutOfMemoryError as error:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps([str(error), error.step, error.documents, error.tokens, error.planned.peak_bytes]))
"""


def test_a_shortage_names_the_micro_batch_beside_the_plan(dense_checkpoint, tmp_path):
    """Step, file, row and tokens of what did not fit, what is in use, what was planned, and what would help."""
    long = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "one two " * 1200}]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*chats(6), long]))
    data = qf.DataSpec.messages(rows).with_max_length(4000).hold_out(qf.DataSpec.messages(chats(2)))
    asked = recipe(dense_checkpoint, epochs=1).with_data(data).with_attention(full="eager")
    asked.save(tmp_path / "recipe.json")
    message, step, documents, tokens, planned = printed("-c", SCRIPT, tmp_path / "recipe.json", tmp_path / "run")
    assert documents == [[str(rows), 7]]
    assert 2000 < tokens <= 4000
    assert message.startswith(
        f"step {step}: out of memory in micro-batch 1 of 1: {tokens:,} tokens, of {rows}, row 7"
    )
    assert "DefaultCPUAllocator" in message
    assert "used: peak bytes " in message
    assert "planned: " in message
    assert "working" in message.partition("planned: ")[2]
    assert "Fix: recipe.fit(qf.Machine.detect())" in message
    assert planned > 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_what_is_a_shortage(error, expected):
    """Torch tells of a GPU by its class and of a CPU by its words."""
    assert is_shortage(error) is expected
