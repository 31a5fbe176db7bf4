"""What an export takes in memory, and what is left of one that was killed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from qwenft.family.architectures import FAMILY
from qwenft.family.inventory import inventory
from qwenft.models.adapter import CONFIG, TENSORS
from qwenft.models.checkpoint import architecture_of
from qwenft.models.lora import lora_config
from qwenft.models.safetensors_file import TensorFile
from qwenft.models.weights import write_index
from qwenft.plan.coverage import trained_weights
from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.model import ModelSpec

# Prints the peak above the interpreter and its libraries.
PEAK = """
import sys
from pathlib import Path
import qwenft as qf
import qwenft.models.probe, qwenft.training.folder, qwenft.models.export
import torch

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

torch.randn(64, 64) @ torch.randn(64, 64)  # libraries that are loaded at first use
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
qf.merge_adapter(sys.argv[1], sys.argv[2], model=qf.ModelSpec(sys.argv[3]))
print(status("VmHWM") - before)
"""


def write_checkpoint(folder, architecture, files=3):
    """Random weights in bfloat16 of a size of the family, in several files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(architecture.to_config()))
    weights = [
        (name, "F32" if w.is_float32 else "BF16", w.shape) for w in inventory(architecture) for name in w.names()
    ]
    places = {}
    generator = torch.Generator().manual_seed(0)
    for number in range(files):
        path = folder / f"model-{number + 1:05}-of-{files:05}.safetensors"
        announced = {name: (dtype, shape) for name, dtype, shape in weights[number::files]}
        with TensorFile(path, announced, {"format": "pt"}) as written:
            for name, (_, shape) in announced.items():
                rows = torch.empty(shape).split(2**14) if len(shape) > 1 else [torch.empty(shape)]
                written.write(name, (block.normal_(std=0.02, generator=generator) for block in rows))
        places |= dict.fromkeys(announced, path.name)
    write_index(folder, places)
    return folder


def write_adapter(folder, architecture, adapter):
    """Random pairs, and rows of tokens."""
    folder.mkdir()
    trained = trained_weights(architecture, adapter)
    config = lora_config(architecture, adapter, trained, "base")
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for entry in trained:
        for module in entry.weight.module_names():
            rows, columns = entry.weight.shape
            shapes = {"token_adapter.trainable_tokens_delta": (len(adapter.tokens), columns)}
            if entry.how == "pair":
                shapes = {"lora_A.weight": (entry.rank, columns), "lora_B.weight": (rows, entry.rank)}
            for part, shape in shapes.items():
                tensors[f"base_model.model.{module}.{part}"] = 0.02 * torch.randn(shape, generator=generator)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    assert (folder / CONFIG).exists()
    return folder


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_merging_four_gigabytes_takes_little_memory(tmp_path):
    """Under 1.2 GB, the proof by logits with it, of a checkpoint with an embedding of one GB."""
    architecture = FAMILY["qwen3.5-2b"]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", architecture)
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) > 4e9
    adapter = write_adapter(tmp_path / "adapter", architecture, AdapterSpec.lora().train_tokens(5, 248_000))
    command = [sys.executable, "-c", PEAK, str(adapter), str(tmp_path / "merged"), str(checkpoint)]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak < 1.2e9
    report = json.loads((tmp_path / "merged" / "export.json").read_text())
    assert report["logits"]["adapter_to_export"] < report["logits"]["base_to_adapter"]


# Merges once to know how long it takes, then 30 times in a process of its own that is killed at a random point.
KILLED = """
import hashlib, os, random, signal, sys, time, warnings
from pathlib import Path
import qwenft as qf
import torch

warnings.simplefilter("ignore")  # a fork beside threads: they wait
adapter, target, checkpoint = (Path(argument) for argument in sys.argv[1:])

def digest(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}

def merge(path):
    return qf.merge_adapter(adapter, path, model=qf.ModelSpec(checkpoint))

whole = digest(merge(target.with_name("whole")))
started = time.perf_counter()
merge(target.with_name("again"))
seconds = time.perf_counter() - started
before = digest(checkpoint) | digest(adapter)
random.seed(0)
there = 0
for attempt in range(30):
    path = target.with_name(f"killed-{attempt}")
    child = os.fork()
    if child == 0:
        merge(path)
        os._exit(0)
    time.sleep(random.uniform(0, 1.1 * seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if path.exists():
        there += 1
        assert digest(path) == whole, attempt
    else:
        assert digest(merge(path)) == whole, attempt
    assert not path.with_name(f".{path.name}.writing").exists()
assert digest(checkpoint) | digest(adapter) == before
print(there)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="it forks")
def test_an_export_that_is_killed_leaves_all_or_nothing(dense_checkpoint, tmp_path):
    """At 30 random points: the whole result under its name or none, and the next attempt succeeds."""
    architecture = architecture_of(ModelSpec(dense_checkpoint))
    adapter = write_adapter(tmp_path / "adapter", architecture, AdapterSpec.lora(rank=4))
    command = [sys.executable, "-c", KILLED, str(adapter), str(tmp_path / "merged"), str(dense_checkpoint)]
    there = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert there < 30
