"""What loading takes beyond its result."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from qwenft.testing import TinySizes, tiny_checkpoint

# Prints the bytes that are held, the largest tensor of the files as it is in memory, and the peak above the start.
PROGRAM = """
import json, sys
from pathlib import Path
import qwenft as qf
from qwenft.kernels.quantized import dense_shape
from qwenft.models.checkpoint import architecture_of
from qwenft.models.load import load_model
from qwenft.models.weights import storage_of
import bitsandbytes, torch
from qwenft.kernels.quantized import quantize

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

quantize(torch.randn(64, 64), "nf4", double_quant=True)  # libraries that are loaded at first use
model = qf.ModelSpec(sys.argv[1])
model = model.quantize(sys.argv[2]) if sys.argv[2] != "none" else model
loaded = architecture_of(model).text_only()
storage = storage_of(model, loaded)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
found = load_model(Path(model.source), loaded, storage=storage)
parameters = list(found.parameters())
held = sum(p.nbytes for p in parameters) + sum(p.quant_state.absmax.nbytes for p in parameters if hasattr(p, "quant_state"))
largest = max(2 * dense_shape(p).numel() for p in parameters)
print(json.dumps([held, largest, status("VmHWM") - before]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Two GB of random experts in bfloat16."""
    sizes = TinySizes(
        hidden=1024,
        expert_ffn=512,
        experts=64,
        experts_per_token=8,
        layers=8,
        heads=8,
        head_dim=128,
        linear_head_dim=64,
        initializer_range=0.02,
    )
    return tiny_checkpoint(tmp_path_factory.mktemp("large") / "checkpoint", "moe", dtype="bfloat16", sizes=sizes)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_loading_takes_its_result_and_two_tensors(checkpoint, kind):
    """Never the checkpoint beside the result: at most two of its tensors, and 300 MB."""
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert size > 1.8e9
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), kind]
    held, largest, peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak <= held + 2 * largest + 300e6
