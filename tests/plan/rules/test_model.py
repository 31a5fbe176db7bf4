"""The model and its precision."""

import re

import attrs
import pytest

from qwenft.family.architectures import FAMILY
from qwenft.machine import Machine
from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.model import ModelSpec

from .helpers import GPU, found, one, recipe


def test_a_tower_that_is_not_there(checkpoint):
    """Asking a text-only checkpoint for its tower is an error, and leaving a tower on disk a note."""
    text_only = checkpoint(FAMILY["qwen3.5-4b"].text_only())
    with_tower = recipe(ModelSpec(text_only).with_vision())
    assert re.search(r"has no vision tower\n     Fix: \.text_only\(\)$", one(with_tower, "model.vision"))
    assert found(recipe(ModelSpec(text_only)), "model.vision") == []
    assert found(recipe(ModelSpec(text_only)), "model.vision", "note") == []
    left = one(recipe(), "model.vision", "note")
    assert left == "model.vision: the vision tower is not loaded; exports keep it as it is"
    assert found(recipe(ModelSpec("qwen3.5-4b").with_vision()), "model.vision", "note") == []


def test_another_precision_than_stored():
    """bfloat16 weights on a machine without bfloat16 are computed in float32, and the plan says so."""
    slow = Machine("old laptop", "cpu", cores=2, host_bytes=2**33)
    plan = recipe().compile(slow)
    assert plan.draft.compute_dtype == "float32"
    assert one(recipe(), "model.dtype", "note", slow) == (
        "model.dtype: weights are stored in bfloat16 and computed in float32: "
        "old laptop multiplies no bfloat16 in hardware"
    )
    assert found(recipe(), "model.dtype", "note", GPU) == []
    assert found(recipe(ModelSpec("qwen3.5-4b", dtype="float32")), "model.dtype", "note", slow) == []


NF4 = ModelSpec("qwen3.5-35b-a3b").quantize("nf4")


def test_quantized_weights_are_not_trained():
    """Full fine-tuning of quantized weights is an error; LoRA beside them is none."""
    full = recipe(NF4, adapter=AdapterSpec.full())
    assert one(full, "model.quantize") == (
        "model.quantize: full fine-tuning trains the weights themselves, and nf4 can only be read\n"
        '     Fix: AdapterSpec.lora(), or weights of 16 bits with optimizer="adamw_8bit"'
    )
    for model in (NF4, NF4.quantize("int8"), NF4.quantize("nf4", experts=False)):
        assert found(recipe(model), "model.quantize") == []


def test_a_tower_is_quantized_where_there_is_one():
    """``vision=True`` without a tower would be without effect."""
    asked = NF4.quantize("nf4", vision=True)
    assert "none is loaded" in one(recipe(asked), "model.quantize")
    assert found(recipe(asked.with_vision()), "model.quantize") == []


def test_experts_of_odd_sizes_are_not_cut_into_blocks(checkpoint):
    """nf4 takes 64 weights at a time, and an expert must hold a whole number of them."""
    family = FAMILY["qwen3.5-35b-a3b"]
    odd = attrs.evolve(family, hidden_size=2056, experts=attrs.evolve(family.experts, intermediate_size=4))
    model = ModelSpec(checkpoint(odd))
    assert one(recipe(model.quantize("nf4")), "model.quantize") == (
        "model.quantize: an expert's down_proj has 8,224 weights, and nf4 takes blocks of 64\n"
        '     Fix: .quantize("int8"), or .quantize("nf4", experts=False)'
    )
    for other in (model.quantize("int8"), model.quantize("nf4", experts=False), model):
        assert found(recipe(other), "model.quantize") == []


@pytest.mark.parametrize("option", ["dropout", "dora"])
def test_experts_take_neither_dropout_nor_dora(option):
    """Quantized or not."""
    value = 0.1 if option == "dropout" else True
    for model in (NF4, ModelSpec("qwen3.5-35b-a3b")):
        asked = AdapterSpec.lora(**{option: value}).on("routed_experts", "full_attention")
        assert f"peft has no {option} on bare parameters" in one(recipe(model, adapter=asked), f"adapter.{option}")
