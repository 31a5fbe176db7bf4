from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

import qwenft as qf
from qwenft.compilation import compile_recipe
from qwenft.testing import TinySizes, tiny_checkpoint

from .helpers import chats
from .in_ranks import trained

ROOT = Path(__file__).parents[2]
LORA = qf.AdapterSpec.lora(rank=4)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Tiny checkpoints whose scan remembers."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {
        kind: tiny_checkpoint(folder / kind, kind, a_log=-3.0) for kind in ("dense", "moe", "vision", "moe-vision")
    }
    # Of a tensor of less than 4,096 numbers bitsandbytes keeps moments in 32 bits: shares are to have more.
    return {**found, "wide": tiny_checkpoint(folder / "wide", "dense", sizes=TinySizes(hidden=256, ffn=256))}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A few pictures of different sizes; of a plain one all keys of the tower are alike, and have no gradient."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64 + 32 * number, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def seen():
    """Conversations of which the first few have a picture, so that the steps of a run, and processes, have none."""
    rows = chats(12)
    for number in range(4):
        question = rows[number]["messages"][0]
        question["content"] = [
            {"type": "image", "image": f"{number}.png"},
            {"type": "text", "text": question["content"]},
        ]
    return rows


FULL, SGD = qf.AdapterSpec.full(), {"optimizer": "sgd", "learning_rate": 1e-2}
DDP = qf.ParallelSpec.ddp()
SEES = LORA.on("full_attention", "linear_attention", "mlp", "vision", "vision_merger")
MOE = LORA.on("full_attention", "linear_attention", "shared_expert", "routed_experts")
IN_BACKWARD = {"optimizer_in_backward": True, "max_grad_norm": None, "tokens_per_step": None}
#: Of each case the checkpoint, what is trained, numbers of the loop, and what processes share.
QUICK = {
    "dense lora": ("dense", LORA, {}),
    "dense full sgd": ("dense", FULL, SGD),
    "vision lora": ("vision", SEES, {}),
    "dense nf4": ("dense", LORA, {}),
    "moe lora": ("moe", MOE, {}),
}
LONG = {
    "moe nf4": ("moe", MOE, {}),
    "dense int8": ("dense", LORA, {}),
    "dense full": ("dense", FULL, {}),
    "moe full": ("moe", FULL, {}),
    "vision full": ("vision", FULL, {}),
    "moe-vision lora": ("moe-vision", LORA.on("full_attention", "routed_experts", "router", "vision"), {}),
    "moe head": ("moe", LORA.on("shared_expert", "lm_head", "embeddings"), {}),
    "moe copies": ("moe", LORA.on("shared_expert").train_fully("lm_head", "norms"), {}),
    "moe tokens": ("moe", LORA.on("shared_expert").train_tokens(3, 5), {}),
    "dense copies": ("dense", LORA.on("mlp").train_fully("embeddings", "norms"), {}),
    "dense tokens": ("dense", LORA.on("mlp").train_tokens(3, 5), {}),
    "dense dora": ("dense", qf.AdapterSpec.lora(rank=4, dora=True), {}),
    "dense mtp": ("dense", FULL.train_mtp(0.3), {}),
    "dense full 8bit": ("wide", FULL, {"optimizer": "adamw_8bit"}),
    "dense full in backward": ("dense", FULL, IN_BACKWARD),
    "dense offload": ("dense", LORA, {}, qf.ParallelSpec.fsdp2(offload="cpu")),
    "dense full kept": ("dense", FULL, SGD, qf.ParallelSpec.fsdp2(reshard_after_forward=False)),
    "dense ddp": ("dense", LORA, {}, DDP),
    "dense full ddp": ("dense", FULL, SGD, DDP),
    "vision ddp": ("vision", SEES, {}, DDP),
}


def case(checkpoints, pictures, name, *, steps):
    """The recipe of a case, for several processes."""
    kind, adapter, training, *parallel = {**QUICK, **LONG}[name]
    model = qf.ModelSpec(checkpoints[kind], dtype="float32")
    data = qf.DataSpec.messages(seen() if "vision" in kind else chats()).with_max_length(128).pack()
    if "vision" in kind:
        model, data = model.with_vision(), data.with_images(pictures)
    for quantized in ("nf4", "int8"):
        model = model.quantize(quantized) if quantized in name else model
    numbers = {"learning_rate": 1e-3, "tokens_per_step": 512, "max_steps": steps, **training}
    return qf.Recipe(
        model,
        data,
        adapter,
        training=qf.TrainingSpec(**numbers, activation_checkpointing="moe" not in kind),
        parallel=parallel[0] if parallel else qf.ParallelSpec.fsdp2(),
    )


def alone_on(recipe, count):
    """What one process makes of a recipe for several."""
    recipe = recipe.with_parallel(qf.ParallelSpec.single())
    if not recipe.training.optimizer_in_backward:
        return trained(recipe)
    # A step is a row of each process: of one that has them all, it is several micro-batches.
    return trained(recipe.with_training(optimizer_in_backward=False), rows=count)


def run_in_ranks(folder, count, nodes=("--standalone",)):
    """Start ``in_ranks.py`` on the recipes of a folder, in so many processes on each node, of options of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    started = [
        subprocess.Popen(
            [*command, *options.split(), "-m", "tests.training.in_ranks", str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for options in nodes
    ]
    for process in started:
        said, _ = process.communicate(timeout=1800)
        assert process.returncode == 0, said[-20000:]


def gathered(folder, name, count):
    """The tensors of all processes put together, and what each of them said."""
    parts = [load_file(folder / f"{name}.{rank}.safetensors") for rank in range(count)]
    found = [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(count)]
    return parts, found


def whole(parts, name, shape):
    """A tensor of which the processes have parts, or all of it."""
    own = [held[name] for held in parts if name in held]
    return own[0] if own[0].shape == shape else torch.cat(own)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def count(request):
    """How many processes."""
    return request.param


@pytest.fixture(scope="module")
def results(checkpoints, pictures, count, tmp_path_factory, request):
    """What one process and several made of each case."""
    is_long = any(item.get_closest_marker("long") for item in request.session.items)
    names, steps = ([*QUICK, *LONG], 20) if is_long else ([*QUICK], 6)
    folder = tmp_path_factory.mktemp(f"ranks-{count}")
    recipes = {name: case(checkpoints, pictures, name, steps=steps) for name in names}
    for name, recipe in recipes.items():
        recipe.save(folder / f"{name}.recipe.json")
    run_in_ranks(folder, count)
    alone = {name: alone_on(recipe, count) for name, recipe in recipes.items()}
    return {name: (*alone[name], *gathered(folder, name, count)) for name in names}


def steps_alike(alone, found):
    """The steps in which all tokens went to the experts that they go to in one process.

    A router whose best experts are as good to six digits may choose either: it does so for a token or two of a run,
    and the loss of that step is another one.
    """
    taken = [np.sum([own["experts"][n] for own in found], axis=0) for n in range(len(alone["experts"]))]
    others = [
        np.abs(np.subtract(one, of_all)).sum() // 2 for one, of_all in zip(alone["experts"], taken, strict=True)
    ]
    assert sum(others) <= 4
    return [number for number, count in enumerate(others) if not count]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.long) for n in LONG)])
def test_several_processes_train_as_one(results, name):
    """Losses, first gradients and last weights are those of one process on the same data."""
    tensors, alone, parts, found = results[name]
    limit = 5e-4 if name.startswith("moe") else 1e-4 if "nf4" in name or "int8" in name else 1e-5
    if "8bit" in name:  # moments are quantized in blocks of what each process has, which are other ones
        limit = 2e-3
    alike = steps_alike(alone, found)
    for own in found:
        assert [own["losses"][n] for n in alike] == pytest.approx([alone["losses"][n] for n in alike], abs=limit)
        assert [own["norms"][n] for n in alike] == pytest.approx(
            [alone["norms"][n] for n in alike], rel=10 * limit
        )
        assert own["tokens"] == alone["tokens"]
    assert alone["losses"][-1] < alone["losses"][0]
    exact = not ("nf4" in name or "moe" in name or "8bit" in name)
    for tensor, expected in tensors.items():
        together = whole(parts, tensor, expected.shape)
        assert together.shape == expected.shape
        largest = float(expected.abs().max()) or 1.0
        if tensor.startswith("gradient ") and exact:
            assert float((together - expected).abs().max()) <= 1e-6 * max(1.0, largest), tensor
        if tensor.startswith("weight ") and exact:
            within = 1e-5 if "sgd" in name else 1e-3
            assert float((together - expected).abs().max()) <= within * largest, tensor


# Prints the bytes that a process holds, the largest weight of the model, and the peak above what was there before.
PROGRAM = """
import json, sys
from pathlib import Path
import qwenft as qf

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

plan = qf.Recipe.load(sys.argv[1]).compile()
plan.data, plan.verify()
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
prepared = plan.prepare()
peak = status("VmHWM") - before
largest = max(2 * p.numel() * (1 + (p.dtype.itemsize == 1)) for p in prepared.model.parameters())
print(json.dumps([prepared.state_bytes, largest, peak]), flush=True)
prepared.ranks.leave()
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("kind", ["nf4", None])
def test_no_process_holds_the_model(tmp_path, kind):
    """Preparing takes a process its share and two weights, of two GB of experts that no process has whole."""
    sizes = TinySizes(hidden=1024, expert_ffn=512, experts=64, experts_per_token=8, layers=8, head_dim=128)
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", "moe", dtype="bfloat16", sizes=sizes)
    assert sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) > 1.6e9
    model = qf.ModelSpec(checkpoint).quantize(kind) if kind else qf.ModelSpec(checkpoint)
    data = qf.DataSpec.messages(chats()).with_max_length(128)
    recipe = qf.Recipe(model, data, LORA, training=qf.TrainingSpec(), parallel=qf.ParallelSpec.fsdp2())
    recipe.save(tmp_path / "recipe.json")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "program.py"), str(tmp_path / "recipe.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    )
    for line in done.stdout.splitlines():
        held, largest, peak = json.loads(line)
        assert peak <= held + 2 * largest + 300e6


@pytest.mark.long
def test_a_model_is_shared_out_within_each_node(checkpoints, pictures, tmp_path):
    """Two nodes of two processes hold the model twice, and train it as one process does."""
    recipe = case(checkpoints, pictures, "dense full sgd", steps=6)
    recipe.with_parallel(qf.ParallelSpec.fsdp2(hybrid=True)).save(tmp_path / "hybrid.recipe.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = f"--nnodes 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port} --rdzv-id two"
    run_in_ranks(tmp_path, 2, [meeting, meeting])
    tensors, alone = trained(recipe.with_parallel(qf.ParallelSpec.single()))
    parts, found = gathered(tmp_path, "hybrid", 4)
    for own in found:
        assert own["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        assert own["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert own["state_bytes"] <= 0.55 * alone["state_bytes"]
    for tensor, expected in tensors.items():
        for node in (parts[:2], parts[2:]):
            together = whole(node, tensor, expected.shape)
            assert float((together - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max())), tensor


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.long) for n in LONG if "ddp" not in n)]
)
def test_each_process_holds_its_share(results, checkpoints, pictures, count, name):
    """What a process holds of weights, gradients and moments, counted, is its share of that of one; plans say so."""
    _, alone, _, found = results[name]
    share = {2: 0.55, 4: 0.30}[count]
    assert max(own["state_bytes"] for own in found) <= share * alone["state_bytes"]
    recipe = case(checkpoints, pictures, name, steps=1)
    plan = compile_recipe(recipe, None, strict=True, ranks=count)
    assert plan.state.total == pytest.approx(max(own["state_bytes"] for own in found), rel=0.05)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.long) for n in LONG)])
def test_processes_get_rows_alike(results, count, name):
    """Every process has as many micro-batches in every step, and at a time of about as many tokens."""
    _, alone, _, found = results[name]
    for step, expected in enumerate(alone["micro_batches"]):
        own = [held["micro_batches"][step] for held in found]
        assert {len(rows) for rows in own} == {-(-len(expected) // count)}
        together = sorted(tokens for rows in own for tokens in rows)
        missing = len(together) - len(expected)
        assert sorted([*expected, *[min(expected)] * missing]) == together
        for alike in zip(*own, strict=True):
            assert max(alike) - min(alike) <= max(expected) - min(expected)
