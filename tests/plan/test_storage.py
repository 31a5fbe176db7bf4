"""What the weights of the family's sizes take."""

from __future__ import annotations

import pytest
import torch
import transformers

from qwenft.display import bytes_text
from qwenft.family.architectures import FAMILY
from qwenft.family.inventory import inventory
from qwenft.plan.storage import Storage, storage_rows
from qwenft.recipe import Recipe
from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.model import ModelSpec
from qwenft.specs.training import TrainingSpec

GIB = 2**30
# GiB of the text half: bfloat16, nf4 with quantized scales, int8.
TEXT = {
    "qwen3.5-9b": (16.68, 7.12, 10.25),
    "qwen3.5-27b": (50.10, 16.47, 27.46),
    "qwen3.5-35b-a3b": (64.56, 18.09, 33.37),
    "qwen3.5-122b-a10b": (227.45, 60.85, 115.44),
}


@pytest.mark.parametrize("size", FAMILY)
@pytest.mark.parametrize("kind", ["nf4", "int8", None])
def test_bytes_are_those_of_the_shapes_that_transformers_builds(size, kind):
    """Of every size on the meta device: half a byte and a scale for 64, or one and a scale a row, for what is quantized."""
    architecture = FAMILY[size]
    spec = ModelSpec(size, vision=True)
    spec = spec if kind is None else spec.quantize(kind)
    with torch.device("meta"):
        config = getattr(transformers, architecture.class_name).config_class(**architecture.to_config())
        model = getattr(transformers, architecture.class_name)(config)
    storage = Storage.of(spec, architecture)
    expected: dict[str, int] = {}
    parameters = dict(model.named_parameters())
    for weight in inventory(architecture):
        for name in weight.names():
            parameter = parameters[name]
            size_of = parameter.numel()
            if name not in storage.names:
                taken = size_of * (4 if weight.is_float32 else 2)
            elif kind == "int8":
                taken = size_of + 4 * (size_of // parameter.shape[-1])
            else:
                blocks = size_of // 64
                taken = size_of // 2 + blocks + 4 * (-(-blocks // 256) + 1)
            expected[weight.role] = expected.get(weight.role, 0) + taken
    counted: dict[str, int] = {}
    for row in storage_rows(architecture, storage):
        counted[row.role] = counted.get(row.role, 0) + row.bytes
    assert counted == expected


@pytest.mark.parametrize("size", TEXT)
def test_what_the_text_halves_take(size):
    """So much must a device hold at the least."""
    spec = ModelSpec(size)
    loaded = FAMILY[size].text_only()
    totals = [
        sum(row.bytes for row in storage_rows(loaded, Storage.of(model, loaded))) / GIB
        for model in (spec, spec.quantize("nf4"), spec.quantize("int8"))
    ]
    assert totals == pytest.approx(TEXT[size], abs=0.01)


def test_the_plan_prints_how_each_role_is_held():
    """In the table of roles, and the sum in the line of the state."""
    plan = Recipe(ModelSpec("qwen3.5-35b-a3b").quantize()).compile()
    lines = {line.partition(" ")[0]: line for line in plan.explain().splitlines()}
    held = {(row.role, row.held_in): bytes_text(row.bytes) for row in plan.storage}
    assert lines["routed_experts"].endswith(f"nf4 {held['routed_experts', 'nf4']}")
    linear = ", ".join(f"{kind} {held['linear_attention', kind]}" for kind in ("nf4", "bfloat16", "float32"))
    assert lines["linear_attention"].endswith(linear)
    assert lines["linear_attention_gates"].endswith(f"bfloat16 {held['linear_attention_gates', 'bfloat16']}")
    assert "large matrices in nf4 with quantized scales" in lines["model"]
    assert plan.state.weights == sum(row.bytes for row in plan.storage)
    assert f"nf4 {held['routed_experts', 'nf4']}" in plan._repr_html_()


def test_weights_that_are_trained_in_float32_are_shown_so():
    """Master weights are float32, and what is frozen beside them is not."""
    recipe = Recipe(ModelSpec("qwen3.5-4b"), adapter=AdapterSpec.full().freeze("embeddings"))
    for master, dtype in ((True, "float32"), (False, "bfloat16")):
        plan = recipe.with_training(TrainingSpec(master_weights=master)).compile()
        held = {row.role: row.held_in for row in plan.storage}
        assert (held["mlp"], held["embeddings"]) == (dtype, "bfloat16")
