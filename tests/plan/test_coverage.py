import attrs
import pytest

from qwenft.family.architectures import FAMILY
from qwenft.family.inventory import inventory
from qwenft.family.roles import default_adapter_roles, roles_of
from qwenft.plan.coverage import coverage, matches, trained_weights
from qwenft.plan.records import StateBytes, state_bytes
from qwenft.plan.storage import Storage
from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.training import TrainingSpec

DENSE = FAMILY["qwen3.5-27b"].text_only()
EXPERTS = FAMILY["qwen3.5-35b-a3b"].text_only()
LORA = AdapterSpec.lora(rank=16)


def row_of(architecture, adapter, role):
    (row,) = [row for row in coverage(architecture, trained_weights(architecture, adapter)) if row.role == role]
    return row


@pytest.mark.parametrize("name", FAMILY)
def test_every_role_has_a_row(name):
    """The table has each role of the model once, holds every parameter, and trains what it says."""
    architecture = FAMILY[name]
    for adapter in (LORA, AdapterSpec.full()):
        rows = coverage(architecture, trained_weights(architecture, adapter))
        assert tuple(row.role for row in rows) == roles_of(architecture)
        assert sum(row.held for row in rows) == sum(weight.count for weight in inventory(architecture))
        trained = sum(entry.parameters for entry in trained_weights(architecture, adapter))
        assert sum(row.parameters for row in rows) == trained


def test_a_lora_without_roles_reaches_attention_and_mlp():
    """The default is both attentions and the MLP that every token visits; the rest is frozen."""
    reached = {row.role for row in coverage(DENSE, trained_weights(DENSE, LORA)) if row.parameters}
    assert reached == {"full_attention", "linear_attention", "mlp"}
    reached = {row.role for row in coverage(EXPERTS, trained_weights(EXPERTS, LORA)) if row.parameters}
    assert reached == set(default_adapter_roles(EXPERTS))


def test_the_parameters_of_a_lora_are_counted_by_hand():
    """The MLP of 27B: rank x (in + out) for three matrices in each of 64 layers."""
    row = row_of(DENSE, LORA, "mlp")
    hidden, ffn = DENSE.hidden_size, DENSE.intermediate_size
    assert row.parameters == 64 * 3 * 16 * (hidden + ffn)
    assert row.held == 64 * 3 * hidden * ffn
    assert row.layers == 64
    assert {module.rpartition(".")[2] for module in row.modules} == {"gate_proj", "up_proj", "down_proj"}
    assert row_of(DENSE, LORA, "full_attention").layers == 16
    assert row_of(DENSE, LORA, "linear_attention").layers == 48


def test_the_rank_of_a_role_counts():
    """A role with a rank of its own has parameters in proportion; DoRA adds its magnitudes."""
    plain = row_of(DENSE, LORA, "mlp").parameters
    assert row_of(DENSE, LORA.with_rank(mlp=4), "mlp").parameters == plain // 4
    assert row_of(DENSE, LORA.with_rank(mlp=4), "full_attention") == row_of(DENSE, LORA, "full_attention")
    magnitudes = 64 * (2 * DENSE.intermediate_size + DENSE.hidden_size)
    assert row_of(DENSE, AdapterSpec.lora(rank=16, dora=True), "mlp").parameters == plain + magnitudes


def test_the_routed_experts_cost_what_the_design_says():
    """Rank 16 on the routed experts is 0.9 B parameters at 35B-A3B and 1.8 B at 122B-A10B."""
    for name, expected in (("qwen3.5-35b-a3b", 0.9e9), ("qwen3.5-122b-a10b", 1.8e9)):
        row = row_of(FAMILY[name], LORA.on("routed_experts"), "routed_experts")
        assert row.parameters == pytest.approx(expected, rel=0.06)


def test_targets_are_added_to_the_roles():
    """A suffix adapts modules beside those of the roles, at the general rank."""
    adapter = LORA.on("full_attention").with_target_modules("mlp.up_proj")
    row = row_of(DENSE, adapter, "mlp")
    assert {module.rpartition(".")[2] for module in row.modules} == {"up_proj"}
    assert row.parameters == 64 * 16 * (DENSE.hidden_size + DENSE.intermediate_size)
    assert row_of(DENSE, adapter, "full_attention") == row_of(DENSE, LORA, "full_attention")
    router = row_of(EXPERTS, LORA.with_target_parameters("mlp.gate.weight"), "router")
    assert router.layers == EXPERTS.layers
    assert router.parameters > 0


def test_targets_can_be_all_that_is_adapted():
    """With no role at all the named modules and parameters are adapted, and the default roles are not."""
    adapter = LORA.on().with_target_modules("q_proj", "v_proj")
    reached = {e.weight.module for e in trained_weights(DENSE, adapter)}
    assert reached == {"self_attn.q_proj", "self_attn.v_proj"}


def test_full_fine_tuning_trains_the_weights_themselves():
    """Each parameter of the trained roles counts once, and frozen roles count none."""
    for row in coverage(DENSE, trained_weights(DENSE, AdapterSpec.full().freeze("embeddings", "norms"))):
        assert row.parameters == (0 if row.role in ("embeddings", "norms") else row.held)
    only = coverage(DENSE, trained_weights(DENSE, AdapterSpec.full().on("mlp", "norms").freeze("norms")))
    assert {row.role for row in only if row.parameters} == {"mlp"}


def test_a_suffix_matches_at_a_dot():
    """Peft's targets are whole names or ends of them behind a dot."""
    assert matches("q_proj", "self_attn.q_proj")
    assert matches("self_attn.q_proj", "self_attn.q_proj")
    assert not matches("proj", "self_attn.q_proj")
    assert not matches("self_attn", "self_attn.q_proj")


def test_the_state_of_a_lora_counts_by_hand():
    """Frozen weights as stored with the float32 ones apart, and 16 bytes for each trained parameter."""
    trained = sum(entry.parameters for entry in trained_weights(DENSE, LORA))
    held = sum(weight.count for weight in inventory(DENSE))
    gdn = 48 * (2 * DENSE.gdn_value_heads + DENSE.gdn_value_dim)  # A_log, dt_bias, norm
    expected = StateBytes(
        weights=2 * held + 2 * gdn,
        trained=4 * trained,
        gradients=4 * trained,
        optimizer=8 * trained,
    )
    assert state_bytes(DENSE, trained_weights(DENSE, LORA), TrainingSpec(), Storage("bfloat16")) == expected
    assert (
        state_bytes(DENSE, trained_weights(DENSE, LORA), TrainingSpec(), Storage("bfloat16")).total
        == expected.weights + 16 * trained
    )
    assert state_bytes(DENSE, trained_weights(DENSE, LORA), TrainingSpec(), Storage("float32")).weights == 4 * held


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (2, 2, 8)),
        ({"tokens_per_step": 4096}, (2, 4, 8)),
        ({"master_weights": True}, (4, 4, 8)),
        ({"optimizer": "sgd"}, (2, 2, 0)),
        ({"optimizer": "sgd", "momentum": 0.9}, (2, 2, 4)),
        ({"optimizer": "paged_adamw"}, (2, 2, 8)),
    ],
)
def test_the_state_of_full_fine_tuning_replaces_the_weights(options, expected):
    """A trained weight is not held a second time: bytes a parameter of weights, gradients and optimizer by hand."""
    held = sum(weight.count for weight in inventory(DENSE))
    gdn = 48 * (2 * DENSE.gdn_value_heads + DENSE.gdn_value_dim)  # A_log, dt_bias and norm are float32 everywhere
    state = state_bytes(
        DENSE, trained_weights(DENSE, AdapterSpec.full()), TrainingSpec(**options), Storage("bfloat16")
    )
    trained, gradients, optimizer = expected
    assert attrs.astuple(state) == (
        0,
        trained * held + (4 - trained) * gdn,
        gradients * held + (4 - gradients) * gdn,
        optimizer * held,
        0,
    )


def test_the_largest_gradient_is_all_that_a_step_in_backward_holds():
    """Of full fine-tuning that is the embeddings' or the head's, of LoRA one matrix's."""
    training = TrainingSpec(optimizer_in_backward=True, max_grad_norm=None)
    full = state_bytes(DENSE, trained_weights(DENSE, AdapterSpec.full()), training, Storage("bfloat16"))
    assert full.gradients == 2 * DENSE.vocabulary * DENSE.hidden_size
    lora = state_bytes(DENSE, trained_weights(DENSE, LORA.on("full_attention")), training, Storage("bfloat16"))
    assert (
        lora.gradients == 4 * 16 * 2 * DENSE.query_heads * DENSE.head_dim
    )  # B of q_proj, which holds the gate too


def test_embeddings_on_the_host_are_counted_apart():
    """Their bytes move out of the sum, and no others."""
    plain = state_bytes(DENSE, trained_weights(DENSE, LORA), TrainingSpec(), Storage("bfloat16"))
    moved = state_bytes(
        DENSE, trained_weights(DENSE, LORA), TrainingSpec(embeddings_on_host=True), Storage("bfloat16")
    )
    assert moved.on_host == 2 * DENSE.vocabulary * DENSE.hidden_size
    assert moved.total + moved.on_host == plain.total
