"""What of the model is trained."""

import re

import attrs
import pytest

from qwenft.family.architectures import FAMILY
from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.model import ModelSpec
from qwenft.specs.training import TrainingSpec

from .helpers import GPU, found, one, recipe


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
            "full fine-tuning has no pairs",
        ),
        (
            AdapterSpec.full().with_target_parameters("gate"),
            "adapter.with_target_parameters",
            "full fine-tuning has no pairs",
        ),
        (AdapterSpec.full().with_rank(mlp=4), "adapter.with_rank", "full fine-tuning has no pairs"),
        (AdapterSpec.full().with_alpha(mlp=4), "adapter.with_alpha", "full fine-tuning has no pairs"),
        (AdapterSpec.full().train_fully("norms"), "adapter.train_fully", "full fine-tuning has no pairs"),
        (AdapterSpec.full().train_tokens(3), "adapter.train_tokens", "full fine-tuning has no pairs"),
        (
            AdapterSpec.lora().only_norms_and_biases(),
            "adapter.only_norms_and_biases",
            "LoRA freezes every weight of the model already",
        ),
        (
            AdapterSpec.lora().on("full_attention").with_alpha(mlp=4),
            "adapter.with_alpha",
            '"mlp" has an alpha but is not adapted',
        ),
        (
            AdapterSpec.lora().on("mlp").train_fully("mlp"),
            "adapter.train_fully",
            '"mlp" is adapted and trained in full',
        ),
        (
            AdapterSpec.lora().train_fully("mlp").with_rank(mlp=8),
            "adapter.with_rank",
            '"mlp" has a rank but is not adapted',
        ),
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
    assert re.match(rf"{place}: {re.escape(text)}[^\n]*\n     Fix: ", message)


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterSpec.full().freeze("mlp"),
        AdapterSpec.full().on("mlp", "norms"),
        AdapterSpec.lora().with_rank(mlp=4),
        AdapterSpec.lora().on("full_attention").with_target_modules("mlp.up_proj").with_rank(mlp=4),
        AdapterSpec.lora(dropout=0.1, dora=True),
        AdapterSpec.lora().on("linear_attention_gates"),
        AdapterSpec.lora().with_alpha(mlp=4).with_layers(3, 7).train_fully("norms").train_tokens(248_077, 3),
        AdapterSpec.lora(initialization="pissa_niter_4", dora=True),
        AdapterSpec.full().only_norms_and_biases().with_layers(0),
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
        "adapter: not adapted: linear_attention_gates of 30 layers, routed_experts of 40 layers, ",
    )
    assert found(recipe("qwen3.5-35b-a3b", adapter=AdapterSpec.full()), "adapter", "note") == []


def test_what_is_adapted_in_some_layers_is_told():
    """A role that is reached in some of its layers is named with those that it is not reached in."""
    text = one(recipe("qwen3.5-27b", adapter=AdapterSpec.lora().with_layers(*range(32))), "adapter", "note")
    assert "full_attention of 8 of 16 layers, linear_attention of 24 of 48 layers, " in text
    assert "mlp of 32 of 64 layers" in text


@pytest.mark.parametrize(
    ("model", "adapter", "place", "text", "fix"),
    [
        (
            "qwen3.5-4b",
            AdapterSpec.lora().with_layers(3, 32),
            "adapter.with_layers",
            "qwen3.5-4b has 32 layers, and no layer 32",
            ".with_layers(*range(32))",
        ),
        (
            "qwen3.5-4b",
            AdapterSpec.lora().on("full_attention").with_layers(0, 1),
            "adapter.on",
            'nothing is trained of "full_attention" in these layers',
            "leave it out",
        ),
        (
            "qwen3.5-4b",
            AdapterSpec.full().on("mlp", "norms").only_norms_and_biases(),
            "adapter.on",
            'nothing is trained of "mlp" that is a norm or a bias',
            "leave it out",
        ),
        (
            "qwen3.5-35b-a3b",
            AdapterSpec.lora(initialization="pissa").on("routed_experts", "full_attention"),
            "adapter.initialization",
            '"pissa" is for Linears, and routed_experts holds others',
            'leave routed_experts out, or initialization="kaiming"',
        ),
        (
            "qwen3.5-4b",
            AdapterSpec.lora(rank=5, initialization="orthogonal"),
            "adapter.initialization",
            '"orthogonal" pairs have an even rank, not 5',
            "rank=6",
        ),
        (
            ModelSpec("qwen3.5-4b").quantize("nf4"),
            AdapterSpec.lora(initialization="olora"),
            "adapter.initialization",
            '"olora" takes the initial pair out of the weights, and nf4 cannot hold what is left',
            'initialization="kaiming", or weights of 16 bits',
        ),
        (
            "qwen3.5-4b",
            AdapterSpec.lora().train_fully("linear_attention"),
            "adapter.train_fully",
            '"linear_attention" has parameters without a module of their own, which peft cannot copy',
            'AdapterSpec.full().on("linear_attention")',
        ),
        (
            ModelSpec("qwen3.5-4b").quantize("nf4"),
            AdapterSpec.lora().train_fully("mlp"),
            "adapter.train_fully",
            '"mlp" is held in nf4, and only read',
            '.on("mlp")',
        ),
        (
            "qwen3.5-4b",
            AdapterSpec.lora().train_tokens(248_077, 248_320),
            "adapter.train_tokens",
            "qwen3.5-4b has 248,320 tokens, none of the id 248320",
            "tokenizer.convert_tokens_to_ids(token)",
        ),
        (
            "qwen3.5-9b",
            AdapterSpec.lora().train_tokens(3).train_fully("lm_head"),
            "adapter.train_tokens",
            "lm_head: trained as a whole already, these rows among the others",
            "one of .train_tokens and that",
        ),
    ],
)
def test_what_cannot_be_trained_so(model, adapter, place, text, fix):
    """Each combination that cannot be is an error with its remedy."""
    assert one(recipe(model, adapter=adapter), place) == f"{place}: {text}\n     Fix: {fix}"


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
            "LoRA freezes every weight of the model already\n     Fix: AdapterSpec.full(), or leave .train_mtp out",
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
