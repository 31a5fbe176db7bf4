from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest

from qwenft.family.architectures import FAMILY, Architecture
from qwenft.family.inventory import inventory
from qwenft.family.parameters import (
    parameter_counts,
    total_parameters,
)
from qwenft.family.roles import roles_of
from qwenft.plan.coverage import coverage, trained_weights
from qwenft.specs.adapter import AdapterSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    Build = Callable[[Architecture], torch.nn.Module]

# peft 0.21 asks transformers 5.23 for its state of checkpointing by the deprecated name.
peft_asks_by_an_old_name = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning:transformers.modeling_utils",
)

# Billions of parameters that transformers 5.23 builds for each size, without mtp.*.
BILLIONS = {
    "qwen3.5-0.8b": 0.853,
    "qwen3.5-2b": 2.213,
    "qwen3.5-4b": 4.539,
    "qwen3.5-9b": 9.410,
    "qwen3.5-27b": 27.357,
    "qwen3.5-35b-a3b": 35.107,
    "qwen3.5-122b-a10b": 122.563,
    "qwen3.5-397b-a17b": 396.802,
}


@pytest.mark.parametrize("name", FAMILY)
def test_totals_are_the_published_ones(name: str) -> None:
    """The total of each size is right to a million parameters."""
    assert round(total_parameters(FAMILY[name]) / 1e9, 3) == BILLIONS[name]


@pytest.mark.parametrize("name", FAMILY)
def test_totals_are_those_of_the_real_classes(name: str, on_meta: Build) -> None:
    """The totals with and without the tower are exactly those of transformers."""
    row = FAMILY[name]
    assert total_parameters(row) == sum(p.numel() for p in on_meta(row).parameters())
    text_half = sum(p.numel() for p in on_meta(row.text_only()).parameters())
    assert total_parameters(row, text_only=True) == text_half
    assert total_parameters(row.text_only()) == text_half


@pytest.mark.parametrize("name", FAMILY)
def test_counts_come_in_the_order_of_roles_and_only_for_roles_that_exist(name: str) -> None:
    """No role is listed that the model lacks, and none that it has is empty."""
    counts = parameter_counts(FAMILY[name])
    assert tuple(counts) == roles_of(FAMILY[name])
    assert all(counts.values())
    assert "vision" not in parameter_counts(FAMILY[name], text_only=True)


def test_a_tied_head_counts_once() -> None:
    """In a tied model the embedding is counted and the head is not."""
    counts = parameter_counts(FAMILY["qwen3.5-4b"])
    assert counts["embeddings"] == 248_320 * 2560
    assert "lm_head" not in counts


@attrs.frozen
class Targets:
    """Suffixes for peft."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def adaptable_roles(architecture: Architecture) -> tuple[str, ...]:
    reached = {weight.role for weight in inventory(architecture) if weight.lora_target is not None}
    return tuple(role for role in roles_of(architecture) if role in reached)


def lora_parameters(architecture: Architecture, ranks: dict[str, int], *, dora: bool = False) -> dict[str, int]:
    """What a plan counts for an adapter on these roles."""
    adapter = AdapterSpec.lora(dora=dora).on(*ranks).with_rank(**ranks)
    return {
        row.role: row.parameters
        for row in coverage(architecture, trained_weights(architecture, adapter))
        if row.role in ranks
    }


def lora_targets(architecture: Architecture, roles: Iterable[str]) -> Targets:
    """What a plan hands to peft for an adapter on these roles."""
    weights = [entry.weight for entry in trained_weights(architecture, AdapterSpec.lora().on(*roles))]
    return Targets(
        *(tuple(w.lora_name for w in weights if w.lora_target == target) for target in ("module", "parameter"))
    )


def peft_model(
    model: torch.nn.Module,
    architecture: Architecture,
    roles: tuple[str, ...],
    rank: int,
    *,
    dora: bool,
):
    import peft

    targets = lora_targets(architecture, roles)
    config = peft.LoraConfig(
        r=rank,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        use_dora=dora,
    )
    return peft.get_peft_model(model, config)


def trainable(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@peft_asks_by_an_old_name
@pytest.mark.parametrize("text_only", [False, True])
def test_lora_adds_to_each_role_what_peft_makes(
    text_only: bool,
    tiny_architecture: Architecture,
    on_cpu: Build,
) -> None:
    """The count of a role is that of the adapter which peft builds from the targets of the role."""
    row = tiny_architecture.text_only() if text_only else tiny_architecture
    made = {role: trainable(peft_model(on_cpu(row), row, (role,), 3, dora=False)) for role in adaptable_roles(row)}
    assert lora_parameters(row, dict.fromkeys(made, 3)) == made


@peft_asks_by_an_old_name
def test_dora_adds_to_each_role_what_peft_makes(tiny_architecture: Architecture, on_cpu: Build) -> None:
    """With magnitudes the counts are still those of peft, which refuses them for experts and router."""
    roles = set(adaptable_roles(tiny_architecture)) - {"routed_experts", "router"}
    made = {
        role: trainable(peft_model(on_cpu(tiny_architecture), tiny_architecture, (role,), 3, dora=True))
        for role in roles
    }
    assert lora_parameters(tiny_architecture, dict.fromkeys(roles, 3), dora=True) == made


@peft_asks_by_an_old_name
def test_all_roles_at_once_add_up(tiny_architecture: Architecture, on_cpu: Build) -> None:
    """Modules and parameters targeted together give the sum of the roles."""
    roles = adaptable_roles(tiny_architecture)
    adapted = peft_model(on_cpu(tiny_architecture), tiny_architecture, roles, 2, dora=False)
    counts = lora_parameters(tiny_architecture, dict.fromkeys(roles, 2))
    assert sum(counts.values()) == trainable(adapted)
    assert tuple(counts) == roles


def test_a_rank_of_its_own_counts_for_its_role_alone() -> None:
    """LoRA parameters are proportional to the rank of each role."""
    row = FAMILY["qwen3.5-9b"]
    base = lora_parameters(row, {"mlp": 1, "full_attention": 1})
    scaled = lora_parameters(row, {"mlp": 16, "full_attention": 4})
    assert scaled == {"full_attention": 4 * base["full_attention"], "mlp": 16 * base["mlp"]}
    assert list(scaled) == ["full_attention", "mlp"], "not in the order of ROLES"


@pytest.mark.parametrize(("name", "billions"), [("qwen3.5-35b-a3b", 0.9), ("qwen3.5-122b-a10b", 1.8)])
def test_rank_16_on_routed_experts_is_large(name: str, billions: float) -> None:
    """The figures that the documentation warns with are right."""
    counts = lora_parameters(FAMILY[name], {"routed_experts": 16})
    assert round(counts["routed_experts"] / 1e9, 1) == billions


@pytest.mark.parametrize("name", FAMILY)
def test_norms_alone_are_no_target(name: str) -> None:
    """LoRA reaches every role but the norms, which therefore add nothing."""
    row = FAMILY[name]
    assert adaptable_roles(row) == tuple(role for role in roles_of(row) if role != "norms")
    assert lora_parameters(row, {"norms": 8}) == {"norms": 0}
    assert lora_targets(row, ["norms"]).modules == ()


def intended_names(architecture: Architecture, role: str) -> tuple[set[str], set[str]]:
    """The full names of what a role should reach, from the inventory's names and not from its suffixes."""
    modules: set[str] = set()
    parameters: set[str] = set()
    for weight in inventory(architecture):
        if weight.role == role and weight.lora_target == "module":
            modules.update(weight.module_names())
        elif weight.role == role and weight.lora_target == "parameter":
            parameters.update(weight.names())
    return modules, parameters


def matched(names: list[str], suffixes: tuple[str, ...]) -> set[str]:
    """The names that peft takes for these targets: equal, or ending in one after a dot."""
    return {name for name in names if any(name == end or name.endswith(f".{end}") for end in suffixes)}


@pytest.mark.parametrize("name", ["qwen3.5-9b", "qwen3.5-35b-a3b"])
def test_suffixes_match_their_role_and_nothing_else(name: str, on_meta: Build) -> None:
    """The targets of a role are its modules and parameters in the whole vision-language class."""
    row = FAMILY[name]
    model = on_meta(row)
    module_names = [name for name, _ in model.named_modules()]
    parameter_names = [name for name, _ in model.named_parameters()]
    for role in roles_of(row):
        targets = lora_targets(row, [role])
        modules, parameters = intended_names(row, role)
        assert matched(module_names, targets.modules) == modules
        assert matched(parameter_names, targets.parameters) == parameters


def test_targets_carry_their_parent() -> None:
    """The suffixes are the ones that the documentation shows."""
    moe = lora_targets(FAMILY["qwen3.5-35b-a3b"], ["shared_expert", "routed_experts", "router"])
    assert moe.modules == (
        "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
        "mlp.shared_expert.down_proj",
        "mlp.shared_expert_gate",
    )
    assert moe.parameters == ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight")
    dense = lora_targets(FAMILY["qwen3.5-9b"], ["vision_merger", "mlp", "vision"])
    assert dense.modules == (
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "attn.qkv",
        "attn.proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
        "merger.linear_fc1",
        "merger.linear_fc2",
    )
    assert dense.parameters == ()
