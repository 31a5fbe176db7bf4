from __future__ import annotations

import re

import pytest

import qwenft as qf
from qwenft.known_recipes import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_plan_without_errors(name):
    """On its machine nothing of it is wrong; it names the hub's checkpoint, and has no data."""
    recipe = qf.preset(name)
    plan = recipe.compile(qf.Machine.named(PRESETS[name].machine))
    assert recipe.data is None
    assert {finding.place for finding in plan.findings if finding.level == "blocked"} <= {"machine", "data"}
    assert recipe.model.vision == ("vision" in name)
    assert (recipe.model.quantization is not None) == ("qlora" in name)
    assert (recipe.parallel.kind == "fsdp2") == (name == "27b-fft" or name.endswith("-fsdp"))
    assert recipe.training.learning_rate == (1e-5 if "fft" in name else 2e-4)


@pytest.mark.parametrize("name", [name for name in PRESETS if "fft" not in name])
def test_adapters_reach_every_projection_that_all_tokens_pass(name):
    """Of the language model: both attentions with all of Gated DeltaNet's, and the MLP or shared expert."""
    plan = qf.preset(name).compile(qf.Machine.named(PRESETS[name].machine))
    adapted = {row.role: {module.rpartition(".")[2] for module in row.modules} for row in plan.coverage}
    assert adapted["full_attention"] == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {"in_proj_qkv", "in_proj_z", "out_proj"} <= adapted["linear_attention"]
    assert adapted["shared_expert" if "moe" in name else "mlp"] == {"gate_proj", "up_proj", "down_proj"}
    assert not adapted.get("vision")


def test_a_mixture_of_experts_says_what_routed_experts_would_take():
    """The note's figure is that of the plan with them."""
    recipe = qf.preset("35b-a3b-moe-qlora")
    (note,) = recipe.notes
    roles = ("full_attention", "linear_attention", "shared_expert", "routed_experts")
    more = recipe.with_adapter(recipe.adapter.on(*roles).with_rank(routed_experts=4))
    machine = qf.Machine.named("H100-80GB")
    extra = more.compile(machine).trained_parameters - recipe.compile(machine).trained_parameters
    (told,) = re.findall(r"trains (\d+) M parameters more", note)
    assert int(told) == round(extra / 1e6)
    assert f"note: recipe: {note}" in recipe.compile(machine).explain()


def test_presets_are_listed_and_named():
    """Each name with its levers and its machine; one that is not there is answered with the nearest."""
    assert list(qf.presets()) == list(PRESETS)
    assert "fits" in qf.presets()["27b-qlora"]
    with pytest.raises(qf.SpecError, match=r"there is none called '27b-qlor'; did you mean '27b-qlora'\?"):
        qf.preset("27b-qlor")
