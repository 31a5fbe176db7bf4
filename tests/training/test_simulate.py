from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import islice

import attrs
import numpy as np
import PIL.Image
import pytest
import torch

import qwenft as qf
from qwenft.testing import TinySizes, measured_peak, tiny_checkpoint
from qwenft.testing.skills import mixed_tasks
from qwenft.training import shallow
from qwenft.training.simulate import largest_rows

from .helpers import recipe

LORA = qf.AdapterSpec.lora(rank=8)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Tiny checkpoints of four units of layers, of which the simulation makes three."""
    folder = tmp_path_factory.mktemp("deep")
    sizes = TinySizes(layers=16)
    return {kind: tiny_checkpoint(folder / kind, kind, sizes=sizes) for kind in ("dense", "moe")}


#: Of each case the checkpoint, what is trained, and numbers of the loop.
QUICK = {
    "dense lora kept": ("dense", LORA, {"activation_checkpointing": False}),
}
LONG = {
    "moe full": ("moe", qf.AdapterSpec.full(), {}),
    "dense lora": ("dense", LORA, {}),
    "dense lora every second": ("dense", LORA, {"activation_checkpointing": 2}),
    "dense full": ("dense", qf.AdapterSpec.full(), {}),
    "dense full kept": ("dense", qf.AdapterSpec.full(), {"activation_checkpointing": False}),
    "dense nf4": ("dense", LORA, {}),
    "dense int8 kept": ("dense", LORA, {"activation_checkpointing": False}),
    "dense bfloat16": ("dense", qf.AdapterSpec.full(), {}),
    "dense 8bit": ("dense", qf.AdapterSpec.full(), {"optimizer": "adamw_8bit"}),
    "dense sgd": ("dense", qf.AdapterSpec.full(), {"optimizer": "sgd"}),
    "dense accumulates": ("dense", qf.AdapterSpec.full(), {"tokens_per_step": 512}),
    "dense in backward": (
        "dense",
        qf.AdapterSpec.full(),
        {"optimizer_in_backward": True, "max_grad_norm": None},
    ),
    "moe lora kept": ("moe", LORA, {"activation_checkpointing": False}),
    "moe experts": ("moe", LORA.on("full_attention", "routed_experts", "router"), {}),
    "moe nf4": ("moe", LORA, {}),
}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.long) for n in LONG)])
def test_a_step_holds_what_was_simulated(deep, name):
    """The peak is within 4 % of what torch's profiler counts in a real step, on top of what is held before it."""
    kind, adapter, training = {**QUICK, **LONG}[name]
    dtype = "bfloat16" if "bfloat16" in name else "float32"
    asked = recipe(deep[kind], adapter=adapter, dtype=dtype, **training)
    for quantized in ("nf4", "int8"):
        asked = asked.with_model(asked.model.quantize(quantized)) if quantized in name else asked
    plan = asked.compile()
    prepared = plan.prepare()
    (row, *_) = largest_rows(prepared.corpus.train)
    steps = list(prepared.batches())
    sizes = [max(batch.layout.total for batch in step) for step in steps]
    step = steps[sizes.index(max(sizes))]
    assert row.accumulates == (len(step) > 1)
    assert plan.memory.peak_bytes == pytest.approx(measured_peak(prepared, step), rel=0.04)
    assert plan.memory.tokens == max(sizes)


def test_many_short_documents_are_not_forgotten():
    """Of packed rows the peak is that of the worst, which need not be the longest: each document is cut by itself."""
    rows = list(islice(mixed_tasks(0), 60))
    data = qf.DataSpec.messages(rows).with_max_length(256).pack()
    plan = qf.Recipe(qf.ModelSpec(qf.testing.tiny_base(), dtype="float32"), data).compile()
    prepared = plan.prepare()
    steps = list(prepared.batches())
    longest = max(steps, key=lambda step: step[0].layout.total)
    measured = [measured_peak(prepared, step) for step in steps]
    assert plan.memory.peak_bytes == pytest.approx(max(measured), rel=0.04)
    assert max(measured) > 1.1 * measured[steps.index(longest)]


VISION = {
    "lora": LORA.on("full_attention", "mlp"),
    "tower kept": LORA.on("mlp", "vision", "vision_merger"),
    "full": qf.AdapterSpec.full(),
}


@pytest.mark.parametrize(
    "name", ["tower kept", *(pytest.param(n, marks=pytest.mark.long) for n in ("lora", "full"))]
)
def test_a_step_with_images_holds_what_was_simulated(tmp_path, name):
    """Likewise with a tower of many blocks, trained or not, on the images of a row."""
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", "vision", sizes=TinySizes(vision_depth=6))
    rows = []
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64 + 32 * number, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(tmp_path / f"{number}.png")
        seen = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "What is it?"}]
        turns = [{"role": "user", "content": seen}, {"role": "assistant", "content": "noise, and nothing else"}]
        rows.append({"messages": turns})
    data = qf.DataSpec.messages(rows).with_max_length(256).pack().with_images(tmp_path)
    training = qf.TrainingSpec(learning_rate=1e-3, activation_checkpointing="kept" not in name)
    model = qf.ModelSpec(checkpoint, dtype="float32").with_vision()
    plan = qf.Recipe(model, data, VISION[name], training=training).compile()
    prepared = plan.prepare()
    steps = list(prepared.batches())
    step = max(steps, key=lambda step: step[0].layout.total)
    assert plan.memory.peak_bytes == pytest.approx(measured_peak(prepared, step), rel=0.04)


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.long
def test_layers_that_are_alike_are_simulated_once(deep, monkeypatch, checkpointed):
    """A model of which the middle is repeated takes, to the byte, what one of all layers takes."""
    plan = recipe(deep["dense"], adapter=LORA, activation_checkpointing=checkpointed).compile()
    repeated = plan.memory_of([60, 40], supervised=50)
    monkeypatch.setattr(shallow, "_is_uniform", lambda _: False)
    whole = plan.memory_of([60, 40], supervised=50)
    assert attrs.evolve(repeated, moment="") == attrs.evolve(whole, moment="")


def test_a_simulation_changes_nothing_and_repeats(dense_checkpoint):
    """Two of them give the same bytes; torch's random numbers go on as if there had been none."""
    plan = recipe(dense_checkpoint, adapter=LORA).compile()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, second = plan.memory_of([100]), plan.memory_of([100])
    assert torch.equal(torch.rand(3), expected)
    assert first == second
    assert sum(first.by_component.values()) == first.peak_bytes


@pytest.mark.long
def test_the_plan_tells_the_peak_when_it_is_known(dense_checkpoint):
    """What was not simulated is not claimed; then the largest row of the data is."""
    plan = recipe(dense_checkpoint, adapter=LORA).compile()
    assert "memory      not yet computed (plan.memory simulates a step)" in plan.explain()
    assert plan.memory.tokens == 128  # a full row, as the data have not been read
    text, page = plan.explain(), plan._repr_html_()
    assert "of live tensors at most, in" in text
    assert re.search(r"\[[^\]]* \] .* of .*: fits\n", text)
    assert "time        not yet computed (plan.time simulates a step)" in text
    assert plan.time.slower > 1
    assert re.search(r"\ntime +[\d.]+ s a step of 128 tokens, .* times slower than", plan.explain())
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", page)]
    assert sum(widths) == pytest.approx(100, abs=0.1)
    assert len(widths) == len([count for count in plan.memory.by_component.values() if count]) + 2
    again = recipe(dense_checkpoint, adapter=LORA).compile()
    longest = max(sum(map(len, row)) for _, step in again.prepare().corpus.train.steps() for row in step)
    assert again.memory.tokens == longest < 128


@pytest.mark.parametrize(
    ("kind", "adapter", "quantized"),
    [
        ("dense", qf.AdapterSpec.full(), None),  # whose head is its embeddings
        ("dense", LORA, "nf4"),
        ("moe", LORA.on("full_attention", "routed_experts"), "int8"),
        ("vision", qf.AdapterSpec.full(), None),
    ],
    ids=["full-tied", "nf4", "int8-experts", "vision"],
)
@pytest.mark.long
def test_what_trains_here_is_calibrated(tmp_path, kind, adapter, quantized):
    """A few layers of every kind of model and of weights make a step, after which nothing has changed."""
    asked = recipe(tiny_checkpoint(tmp_path / kind, kind), adapter=adapter)
    asked = asked.with_model(asked.model.quantize(quantized)) if quantized else asked
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert asked.compile().time.slower > 1
    assert torch.equal(torch.rand(3), expected)


def test_a_machine_of_unknown_speed_has_memory_and_no_time(dense_checkpoint):
    """A card that is in no table is planned for as others are, and its time is not made up."""
    unknown = attrs.evolve(qf.Machine.detect(), name="a new card", bandwidth=0.0)
    plan = recipe(dense_checkpoint, adapter=LORA).compile(unknown)
    assert plan.memory.peak_bytes > 0
    with pytest.raises(qf.PlanError, match=r"how fast a new card is is not known[\s\S]*bandwidth="):
        plan.time  # noqa: B018
    assert "time        not estimated: how fast a new card is is not known" in plan.explain()


def test_kernels_that_cannot_be_followed_are_left_out_visibly(dense_checkpoint):
    """What a backend holds that launches kernels and declares nothing is named as not counted, and the rest is."""
    plan = recipe(dense_checkpoint, adapter=LORA).compile()
    flex = plan.recipe.with_attention(full="flex_attention").compile(strict=False)
    assert flex.memory.left_out == ("flex_attention (full)",)
    assert "NOT counted: what the kernels of flex_attention (full) hold" in flex.explain()
    assert plan.memory.left_out == ()
    assert 0.9 * plan.memory.peak_bytes < flex.memory.peak_bytes <= plan.memory.peak_bytes


@pytest.mark.long
def test_a_checkpoint_that_is_quantized_takes_as_much(deep, tmp_path):
    """What its files say is quantized is held so in the simulation too."""
    asked = recipe(deep["dense"], adapter=LORA)
    plan = asked.with_model(asked.model.quantize("nf4")).compile()
    stored = asked.with_model(plan.save_quantized(tmp_path / "stored")).compile()
    assert stored.memory_of([40]) == plan.memory_of([40])


class AsksTensors(qf.AttentionBackend):
    """A backend that branches on values."""

    name = "asks_tensors"
    supports_packing = True
    uses_flash_lib = False

    def attend(self, query, key, value, *, layout, scale, causal=True):
        """As torch's own does, after a look at the numbers."""
        assert query.isfinite().all()
        return qf.backends.full("sdpa").attend(query, key, value, layout=layout, scale=scale, causal=causal)


def test_a_backend_that_asks_tensors_for_values_is_left_out(dense_checkpoint):
    """One of the user's own that cannot be followed is named too; attention of torch's own is counted."""
    plan = recipe(dense_checkpoint, adapter=LORA).with_attention(full=AsksTensors()).compile()
    assert plan.memory_of([20]).left_out == ("asks_tensors (full)",)


def test_a_loss_that_asks_tensors_for_values_is_refused(dense_checkpoint):
    """Nothing stands for it, and a figure without it would be none."""

    def loss(hidden, batch, head):
        total = head(hidden).float().sum()
        return total if total > 0 else batch.tokens - total

    plan = recipe(dense_checkpoint, adapter=LORA, loss=loss).compile()
    with pytest.raises(qf.PlanError, match=r'training\.loss: it asks tensors for values[\s\S]*Fix: loss="auto"'):
        plan.memory_of([20])


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="peaks are told by the kernel")
def test_a_model_of_any_size_takes_no_memory():
    """The largest of the family is simulated in less than 3 GB, with nothing of it at hand."""
    script = """
import qwenft as qf
model = qf.ModelSpec("qwen3.5-397b-a17b").text_only().quantize("nf4")
memory = qf.Recipe(model, adapter=qf.AdapterSpec.lora(rank=16)).compile(strict=False).memory_of([256])
assert memory.by_component["weights"] > 180 * 2**30, memory
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_maxrss * 1024 < 3e9


@pytest.mark.parametrize(
    "parallel",
    [
        qf.ParallelSpec.fsdp2(),
        qf.ParallelSpec.fsdp2(offload="cpu"),
        qf.ParallelSpec.ddp(),
    ],
)
@pytest.mark.long
def test_a_plan_for_cards_that_are_not_here_is_simulated(parallel):
    """Of the processes each has its part of the weights, on the device or on the host, or all of them."""
    model = qf.ModelSpec("qwen3.5-0.8b").text_only()
    asked = qf.Recipe(model, adapter=qf.AdapterSpec.lora(rank=8), parallel=parallel)
    plan = asked.compile(qf.Machine.named("4xH100-80GB"), strict=False)
    alone = asked.with_parallel(qf.ParallelSpec.single()).compile(qf.Machine.named("H100-80GB"), strict=False)
    memory, whole = plan.memory_of([256]), alone.memory_of([256])
    share = 0 if parallel.offload else 1 if parallel.kind == "ddp" else 1 / 4
    frozen = whole.by_component["weights"]
    assert memory.by_component["weights"] == pytest.approx(share * frozen, rel=0.01, abs=2e6)
    assert memory.by_component["collectives"] > 0
    assert memory == plan.memory_of([256])


def test_offloaded_activations_are_on_the_host():
    """What checkpointed layers were given is not on the device, but for the one that is computed."""
    asked = qf.Recipe(qf.ModelSpec("qwen3.5-0.8b"), adapter=qf.AdapterSpec.lora(rank=8))
    machine = qf.Machine.named("H100-80GB")
    kept = asked.compile(machine, strict=False).memory_of([512])
    offloaded = asked.with_training(activation_offloading=True).compile(machine, strict=False).memory_of([512])
    inputs = 512 * 1024 * 2  # of a layer, in bfloat16
    saved = kept.by_component["activations"] - offloaded.by_component["activations"]
    assert saved >= 20 * inputs


def test_work_is_counted_by_the_products_that_are_made():
    """Of frozen weights under checkpointing a token takes three passes of two operations a weight."""
    asked = qf.Recipe(qf.ModelSpec("qwen3.5-27b").quantize("nf4"), adapter=qf.AdapterSpec.lora(rank=16))
    plan = asked.compile(qf.Machine.named("H100-80GB"), strict=False)
    held = {row.role: row.held for row in plan.coverage}
    passed = sum(held.values()) - held["embeddings"]
    assert plan.time.operations == pytest.approx(6 * passed * 2048, rel=0.08)
    assert plan.time.step_seconds > plan.time.operations / 989e12
    assert plan.time.tokens_per_second == pytest.approx(2048 / plan.time.step_seconds)


@pytest.mark.long
def test_the_experts_that_are_not_simulated_are_counted_as_work():
    """A mixture of experts takes the operations of the experts that a token passes, whichever these are."""
    asked = qf.Recipe(qf.ModelSpec("qwen3.5-35b-a3b").quantize("nf4"), adapter=qf.AdapterSpec.lora(rank=16))
    plan = asked.compile(qf.Machine.named("H100-80GB"), strict=False)
    held = {row.role: row.held for row in plan.coverage}
    passed = sum(held.values()) - held["embeddings"] - held["routed_experts"] * (1 - 8 / 256)
    assert plan.time.operations == pytest.approx(6 * passed * 2048, rel=0.12)
