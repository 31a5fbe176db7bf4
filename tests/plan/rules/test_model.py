"""The model, its precision, and what of it is trained."""

import re

import attrs
import pytest

from qwenft.family.architectures import FAMILY
from qwenft.machine import Machine
from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.model import ModelSpec
from qwenft.specs.training import TrainingSpec

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


@pytest.mark.parametrize(
    ("adapter", "place"),
    [
        (AdapterSpec.lora().on("full_attention", "routed_experts"), "adapter.on"),
        (AdapterSpec.full().freeze("routed_experts"), "adapter.freeze"),
        (AdapterSpec.lora().with_rank(routed_experts=4), "adapter.with_rank"),
    ],
)
def test_a_role_that_the_model_lacks(adapter, place):
    """A role of another kind of model is an error with the roles that there are."""
    text = one(recipe("qwen3.5-27b", adapter=adapter), place)
    assert text.startswith(
        f'{place}: "routed_experts" does not exist in qwen3.5-27b (dense). '
        "Roles here: full_attention, linear_attention, linear_attention_gates, mlp, ",
    )
    assert "\n     Fix: .on('full_attention', 'linear_attention', " in text
    assert found(recipe("qwen3.5-35b-a3b", adapter=adapter.on("routed_experts")), place) == []


def test_a_dense_role_in_a_mixture_of_experts():
    """The message names the kind of model."""
    text = one(recipe("qwen3.5-35b-a3b", adapter=AdapterSpec.lora().on("mlp")), "adapter.on")
    assert '"mlp" does not exist in qwen3.5-35b-a3b (mixture of experts)' in text
    assert "Fix: .on('full_attention', 'linear_attention', 'shared_expert')" in text


def test_a_role_that_is_not_loaded():
    """A role of the tower needs the tower."""
    adapter = AdapterSpec.lora().on("vision")
    text = one(recipe(adapter=adapter), "adapter.on")
    assert text == 'adapter.on: "vision" is not loaded\n     Fix: recipe.with_model(vision=True)'
    assert found(recipe(ModelSpec("qwen3.5-4b").with_vision(), adapter=adapter), "adapter.on") == []


def test_a_head_that_is_tied():
    """A tied model has no head of its own."""
    tied = next(name for name, row in FAMILY.items() if row.tied)
    loose = next(name for name, row in FAMILY.items() if not row.tied)
    adapter = AdapterSpec.full().on("lm_head")
    assert "it is tied to the embeddings" in one(recipe(tied, adapter=adapter), "adapter.on")
    assert found(recipe(loose, adapter=adapter), "adapter.on") == []


@pytest.mark.parametrize(
    ("adapter", "place", "text"),
    [
        (AdapterSpec.lora().freeze("mlp"), "adapter.freeze", "LoRA freezes every weight of the model already"),
        (
            AdapterSpec.full().with_target_modules("q_proj"),
            "adapter.with_target_modules",
            "full fine-tuning has no targets",
        ),
        (
            AdapterSpec.full().with_target_parameters("gate"),
            "adapter.with_target_modules",
            "full fine-tuning has no targets",
        ),
        (AdapterSpec.full().with_rank(mlp=4), "adapter.with_rank", "full fine-tuning has no rank"),
        (
            AdapterSpec.lora().on("full_attention").with_rank(mlp=4),
            "adapter.with_rank",
            '"mlp" has a rank but is not adapted',
        ),
    ],
)
def test_a_field_of_the_adapter_that_would_do_nothing(adapter, place, text):
    """No option is ignored: each that has no effect is an error with its remedy."""
    message = one(recipe(adapter=adapter), place)
    assert message.startswith(f"{place}: {text}\n     Fix: ")


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterSpec.full().freeze("mlp"),
        AdapterSpec.full().on("mlp", "norms"),
        AdapterSpec.lora().with_rank(mlp=4),
        AdapterSpec.lora().on("full_attention").with_target_modules("mlp.up_proj").with_rank(mlp=4),
        AdapterSpec.lora(dropout=0.1, dora=True),
        AdapterSpec.lora().on("linear_attention_gates"),
    ],
)
def test_an_adapter_whose_fields_all_count(adapter):
    """Options that have an effect are no error."""
    assert [f for f in recipe(adapter=adapter).compile(strict=False).findings if f.level == "error"] == []


@pytest.mark.parametrize(
    ("model", "adapter", "place", "text"),
    [
        (
            "qwen3.5-4b",
            AdapterSpec.lora().with_target_modules("q_prj"),
            "adapter.with_target_modules",
            "'q_prj' matches no module",
        ),
        (
            "qwen3.5-35b-a3b",
            AdapterSpec.lora().with_target_parameters("mlp.gat.weight"),
            "adapter.with_target_parameters",
            "'mlp.gat.weight' matches no parameter",
        ),
        ("qwen3.5-4b", AdapterSpec.lora().on("norms"), "adapter.on", 'LoRA reaches nothing in "norms"'),
    ],
)
def test_a_target_that_matches_nothing(model, adapter, place, text):
    """Every suffix and role that is named must reach something."""
    assert one(recipe(model, adapter=adapter), place).startswith(f"{place}: {text}\n     Fix: ")


def test_targets_that_match():
    """A suffix at a dot of a name, and the name of an expert stack or a router, are found."""
    adapter = AdapterSpec.lora().with_target_modules("q_proj", "mlp.shared_expert.up_proj")
    adapter = adapter.with_target_parameters("mlp.gate.weight", "experts.down_proj")
    assert recipe("qwen3.5-35b-a3b", adapter=adapter).compile().trained_parameters > 0


def test_nothing_is_trained():
    """Freezing every role that is trained leaves nothing to do."""
    adapter = AdapterSpec.full().on("mlp").freeze("mlp")
    assert one(recipe(adapter=adapter), "adapter") == "adapter: nothing is trained\n     Fix: AdapterSpec.lora()"


@pytest.mark.parametrize(
    ("option", "value", "fix"),
    [("dropout", 0.1, "dropout=0.0"), ("dora", True, "dora=False")],
)
def test_what_lora_cannot_do_on_bare_parameters(option, value, fix):
    """Peft applies neither dropout nor DoRA to expert stacks and routers."""
    adapter = AdapterSpec.lora(**{option: value})
    bare = one(recipe("qwen3.5-35b-a3b", adapter=adapter.on("routed_experts", "router")), f"adapter.{option}")
    assert f"peft has no {option} on bare parameters, and routed_experts, router holds such" in bare
    assert bare.endswith(f"Fix: AdapterSpec.lora({fix})")
    assert found(recipe("qwen3.5-35b-a3b", adapter=adapter), f"adapter.{option}") == []


def test_lora_on_tied_embeddings():
    """A LoRA on tied embeddings would leave the head behind."""
    tied = next(name for name, row in FAMILY.items() if row.tied)
    loose = next(name for name, row in FAMILY.items() if not row.tied)
    adapter = AdapterSpec.lora().on("embeddings")
    assert f'"embeddings" of {tied} would leave its tied head behind' in one(
        recipe(tied, adapter=adapter),
        "adapter.on",
    )
    assert found(recipe(loose, adapter=adapter), "adapter.on") == []
    assert found(recipe(tied, adapter=AdapterSpec.full().on("embeddings")), "adapter.on") == []


def test_what_is_not_adapted_is_told():
    """A LoRA names the roles that it does not reach; full fine-tuning has no such note."""
    text = one(recipe("qwen3.5-35b-a3b"), "adapter", "note")
    assert text.startswith(
        "adapter: not adapted: linear_attention_gates, routed_experts, router, embeddings, lm_head",
    )
    assert found(recipe("qwen3.5-35b-a3b", adapter=AdapterSpec.full()), "adapter", "note") == []


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


def test_multi_token_prediction_that_can_be_trained():
    """With all roles, with others or alone; left out, nothing of it is loaded."""
    whole = AdapterSpec.full().train_mtp()
    for adapter in (whole, whole.on("mtp"), whole.on("mlp", "mtp"), whole.freeze("embeddings")):
        plan = recipe(adapter=adapter).compile(GPU)
        assert plan.coverage[[row.role for row in plan.coverage].index("mtp")].parameters > 0
    assert "mtp" not in {row.role for row in recipe(adapter=AdapterSpec.full()).compile(GPU).coverage}
    assert recipe(adapter=whole.on("mtp")).compile(GPU).trained_parameters < 10**9


@pytest.mark.parametrize(
    ("adapter", "place", "message"),
    [
        (
            AdapterSpec.lora().train_mtp(),
            "adapter.train_mtp",
            'the weights of "mtp" are trained themselves\n     Fix: AdapterSpec.full().train_mtp()',
        ),
        (
            AdapterSpec.full().train_mtp().on("mlp"),
            "adapter.train_mtp",
            '.on leaves "mtp" out\n     Fix: .on(..., "mtp"), or no .train_mtp',
        ),
        (
            AdapterSpec.full().train_mtp().freeze("mtp"),
            "adapter.train_mtp",
            '.freeze leaves "mtp" out\n     Fix: .on(..., "mtp"), or no .train_mtp',
        ),
        (
            AdapterSpec.full().on("mtp"),
            "adapter.on",
            '"mtp" is not loaded\n     Fix: AdapterSpec.full().train_mtp()',
        ),
        (
            AdapterSpec.full().freeze("mtp"),
            "adapter.freeze",
            '"mtp" is not loaded\n     Fix: AdapterSpec.full().train_mtp()',
        ),
    ],
)
def test_multi_token_prediction_that_would_not_be_trained(adapter, place, message):
    """Each is an error with its remedy."""
    assert one(recipe(adapter=adapter), place) == f"{place}: {message}"


def test_multi_token_prediction_without_a_layer_or_its_loss(checkpoint):
    """A checkpoint that has no such layer, and a loss function that is not told of it."""
    without = checkpoint(attrs.evolve(FAMILY["qwen3.5-4b"], has_mtp=False))
    whole = AdapterSpec.full().train_mtp()
    text = one(recipe(ModelSpec(without), adapter=whole), "adapter.train_mtp")
    assert text.endswith(
        "has not the one multi-token-prediction layer of the family\n     Fix: leave .train_mtp out"
    )

    def own(hidden, batch, head):
        raise NotImplementedError

    text = one(recipe(adapter=whole, training=TrainingSpec(loss=own)), "adapter.train_mtp")
    assert text.startswith(
        'adapter.train_mtp: own() is given what the model\'s own head is given, and nothing of "mtp"'
    )
    assert text.endswith('\n     Fix: loss="chunked", or no .train_mtp')
