from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest

from qwenft.family.architectures import FAMILY, FULL_ATTENTION, LINEAR_ATTENTION, Architecture
from qwenft.family.inventory import inventory, named_shapes, role_of
from qwenft.family.roles import ROLES, default_adapter_roles, roles_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Build = Callable[[Architecture], torch.nn.Module]


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", FAMILY)
def test_names_and_shapes_are_those_of_the_vision_language_class(name: str, on_meta: Build) -> None:
    """Every parameter of the real class is in the inventory with its shape, and no other is."""
    assert named_shapes(FAMILY[name]) == shapes_of(on_meta(FAMILY[name]))


@pytest.mark.parametrize("name", FAMILY)
def test_names_and_shapes_are_those_of_the_text_only_class(name: str, on_meta: Build) -> None:
    """A text-only checkpoint, and the text half of a whole one, are what ...ForCausalLM holds."""
    alone = FAMILY[name].text_only()
    real = shapes_of(on_meta(alone))
    assert named_shapes(alone) == real
    assert named_shapes(FAMILY[name], text_only=True) == real


def test_uneven_sizes_give_the_names_and_shapes_of_the_real_class(
    tiny_architecture: Architecture,
    on_meta: Build,
) -> None:
    """No two sizes are equal here, so a swapped dimension would show."""
    assert named_shapes(tiny_architecture) == shapes_of(on_meta(tiny_architecture))


@pytest.mark.parametrize("layer_type", [FULL_ATTENTION, LINEAR_ATTENTION])
def test_a_model_of_one_kind_of_layer_has_no_weight_of_the_other(
    layer_type: str,
    tiny_architecture: Architecture,
    on_meta: Build,
) -> None:
    """A kind of layer that does not occur leaves no weights and no role behind."""
    row = attrs.evolve(tiny_architecture, layer_types=(layer_type,) * tiny_architecture.layers)
    assert named_shapes(row) == shapes_of(on_meta(row))
    assert set(roles_of(row)) == {weight.role for weight in inventory(row)}


@pytest.mark.parametrize("name", FAMILY)
def test_kinds_are_the_module_classes(name: str, on_meta: Build) -> None:
    """Linear, embedding and expert stacks are what the real modules are, and nothing else is called so."""
    import torch

    model = on_meta(FAMILY[name])
    for weight in inventory(FAMILY[name]):
        module = model.get_submodule(weight.module_names()[0])
        is_linear = isinstance(module, torch.nn.Linear) and weight.parameter == "weight"
        is_token_embedding = module is model.get_input_embeddings()
        is_stack = type(module).__name__.endswith("Experts")
        assert (weight.kind == "linear") is is_linear, weight
        assert (weight.kind == "embedding") is is_token_embedding, weight
        assert (weight.kind == "experts") is is_stack, weight


@pytest.mark.parametrize("name", FAMILY)
def test_the_count_is_over_all_layers(name: str) -> None:
    """The counts of the inventory are the sizes of the named parameters."""
    import math

    shapes = named_shapes(FAMILY[name])
    for weight in inventory(FAMILY[name]):
        assert weight.count == sum(math.prod(shapes[full]) for full in weight.names())


# One hand-written row for each module of a layer, from the modelling files.
@pytest.mark.parametrize("name", FAMILY)
def test_the_layer_of_multi_token_prediction_is_there_where_it_is_loaded(name: str) -> None:
    """All else stays as it is without it; it is a layer of full attention, a matrix of 2 H x H and three norms."""
    without = FAMILY[name]
    row = without.with_mtp()
    layer = [weight for weight in inventory(row) if weight.role == "mtp"]
    assert {weight for weight in inventory(row) if weight.role != "mtp"} == set(inventory(without))
    prefix, hidden = f"model.layers.{without.full_attention_layers[-1]}.", row.hidden_size
    shapes = named_shapes(without, text_only=True).items()
    inside = {name.removeprefix(prefix): shape for name, shape in shapes if name.startswith(prefix)}
    wanted = {f"mtp.layers.0.{name}": shape for name, shape in inside.items()} | {
        "mtp.fc.weight": (hidden, 2 * hidden),
        **dict.fromkeys(
            ("mtp.norm.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight"), (hidden,)
        ),
    }
    for text_only in (False, True):
        assert {n: w.shape for w in layer for n in w.names(text_only=text_only)} == wanted
        assert {n: role_of(row.text_only() if text_only else row, n) for n in wanted} == dict.fromkeys(
            wanted, "mtp"
        )
    kinds = {weight.module: weight.kind for weight in layer}
    assert kinds["mtp.fc"] == kinds["mtp.layers.0.self_attn.q_proj"] == "linear"
    assert kinds["mtp.norm"] == "parameter"
    assert not any(weight.is_float32 for weight in layer)


EXPECTED_ROLES = {
    "self_attn.q_proj": "full_attention",
    "self_attn.k_proj": "full_attention",
    "self_attn.v_proj": "full_attention",
    "self_attn.o_proj": "full_attention",
    "self_attn.q_norm": "full_attention",
    "self_attn.k_norm": "full_attention",
    "linear_attn.in_proj_qkv": "linear_attention",
    "linear_attn.in_proj_z": "linear_attention",
    "linear_attn.out_proj": "linear_attention",
    "linear_attn.conv1d": "linear_attention",
    "linear_attn": "linear_attention",
    "linear_attn.norm": "linear_attention",
    "linear_attn.in_proj_a": "linear_attention_gates",
    "linear_attn.in_proj_b": "linear_attention_gates",
    "mlp.gate_proj": "mlp",
    "mlp.up_proj": "mlp",
    "mlp.down_proj": "mlp",
    "mlp.shared_expert.gate_proj": "shared_expert",
    "mlp.shared_expert.up_proj": "shared_expert",
    "mlp.shared_expert.down_proj": "shared_expert",
    "mlp.experts": "routed_experts",
    "mlp.gate": "router",
    "mlp.shared_expert_gate": "router",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
    "model.language_model.norm": "norms",
    "model.language_model.embed_tokens": "embeddings",
    "lm_head": "lm_head",
}


@pytest.mark.parametrize("name", ["qwen3.5-9b", "qwen3.5-35b-a3b"])
def test_each_module_of_the_text_half_has_its_role(name: str) -> None:
    """The roles of the text half are the ones written down by hand."""
    for weight in inventory(FAMILY[name]):
        if weight.half == "text":
            assert weight.role == EXPECTED_ROLES[weight.module]


def test_the_merger_has_a_role_of_its_own() -> None:
    """Of the vision half the merger's weights are vision_merger, and all others vision."""
    for weight in inventory(FAMILY["qwen3.5-9b"]):
        if weight.half == "vision":
            is_merger = weight.names()[0].startswith("model.visual.merger.")
            assert weight.role == ("vision_merger" if is_merger else "vision")


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("text_only", [False, True])
def test_the_roles_of_a_model_are_those_of_its_weights(name: str, text_only: bool) -> None:
    """A role exists where a weight has it, in the common order."""
    row = FAMILY[name].text_only() if text_only else FAMILY[name]
    used = {weight.role for weight in inventory(row)}
    assert roles_of(row) == tuple(role for role in ROLES if role in used)


def test_tied_dense_and_text_only_models_lack_what_they_lack() -> None:
    """A tied model has no head of its own, a dense one no experts, a text-only one no tower."""
    assert "lm_head" not in roles_of(FAMILY["qwen3.5-4b"])
    assert "lm_head" in roles_of(FAMILY["qwen3.5-9b"])
    assert not {"shared_expert", "routed_experts", "router"} & set(roles_of(FAMILY["qwen3.5-9b"]))
    assert "mlp" not in roles_of(FAMILY["qwen3.5-35b-a3b"])
    assert not {"vision", "vision_merger"} & set(roles_of(FAMILY["qwen3.5-9b"].text_only()))


def test_an_adapter_reaches_both_attentions_and_the_common_mlp() -> None:
    """Without being told, a dense model adapts its MLP and a mixture its shared expert, never routed experts."""
    assert default_adapter_roles(FAMILY["qwen3.5-9b"]) == ("full_attention", "linear_attention", "mlp")
    assert default_adapter_roles(FAMILY["qwen3.5-35b-a3b"]) == (
        "full_attention",
        "linear_attention",
        "shared_expert",
    )


def test_a_vision_weight_has_no_name_in_the_text_only_class() -> None:
    """The vision half vanishes where only the text half is loaded."""
    for weight in inventory(FAMILY["qwen3.5-9b"]):
        assert bool(weight.names(text_only=True)) is (weight.half == "text")
