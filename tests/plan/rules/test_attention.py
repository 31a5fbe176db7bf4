"""Backends, and what they declare."""

import pytest

from qwenft.machine import Machine
from qwenft.plan.findings import blocked
from qwenft.specs.attention import AttentionSpec
from qwenft.specs.model import ModelSpec

from .helpers import DATA, GPU, Forgetful, Windowed, found, one, recipe


@pytest.mark.parametrize(
    ("attention", "slot"),
    [(AttentionSpec(full=Windowed()), "full"), (AttentionSpec(linear=Forgetful()), "linear")],
)
def test_packed_documents_must_stay_apart(attention, slot):
    """Packing with a backend that cannot is an error in either half, and no error without packing."""
    backend = getattr(attention, slot)
    assert one(recipe(data=DATA.pack(), attention=attention), "data.packing") == (
        f"data.packing: documents are packed, but attention.{slot} = {backend!r} has supports_packing = False,\n"
        "     so a token could attend to another document.\n"
        f'     Fix: recipe.with_data(data.unpack()), or .with_attention({slot}="auto").'
    )
    assert found(recipe(data=DATA, attention=attention), "data.packing") == []
    assert found(recipe(data=DATA.pack(), attention=AttentionSpec(full=Windowed(True))), "data.packing") == []


def test_a_backend_that_cannot_compute_the_model():
    """A refusal and a lack of float32 are errors on any machine."""
    refusing = AttentionSpec(full=Windowed(refusal="heads of 256 are too wide"))
    assert one(recipe(attention=refusing), "attention.full") == (
        'attention.full: windowed cannot: heads of 256 are too wide\n     Fix: .with_attention(full="auto")'
    )
    half = AttentionSpec(full=Windowed(needs_half_precision=True))
    float32 = recipe(ModelSpec("qwen3.5-4b", dtype="float32"), attention=half)
    assert one(float32, "attention.full").startswith(
        "attention.full: windowed computes in 16 bits only, the model in float32",
    )
    assert found(recipe(attention=half), "attention.full", machine=GPU) == []


def test_a_backend_that_is_not_installed_blocks():
    """What is right but not available here is no error: the plan is returned and says what to install."""
    plan = recipe(attention=AttentionSpec(full=Windowed(usable=False)), data=DATA).compile(GPU)
    finding = next(f for f in plan.findings if f.place == "attention.full")
    assert finding == blocked(
        "attention.full",
        "windowed is not available: no kernel for cuda",
        "pip install windowed",
    )


def test_an_unknown_backend_name():
    """A name that no backend has is an error with the nearest, and the other slot is still planned."""
    text = one(recipe(attention=AttentionSpec(full="spda", linear="torch")), "attention.full")
    assert text.startswith("attention.full: no backend is called 'spda'; did you mean 'sdpa'?")
    text = one(recipe(attention=AttentionSpec(linear="fast")), "attention.linear")
    assert "no backend is called 'fast'. Known: torch, fla, reference, transformers" in text


def test_the_choice_of_auto_is_told():
    """Each slot that was left to "auto" has a note, and a named one has none."""
    assert one(recipe(), "attention.full", "note") == (
        'attention.full: "auto" chose sdpa; passed over: '
        "flash_attention_3 (it needs an NVIDIA GPU), flash_attention_2 (it needs an NVIDIA GPU)"
    )
    assert one(recipe(), "attention.linear", "note") == (
        'attention.linear: "auto" chose torch; passed over: fla (it needs an NVIDIA GPU)'
    )
    assert found(recipe(attention=AttentionSpec(full="sdpa")), "attention.full", "note") == []


def test_the_tower_has_a_slot_of_its_own():
    """A loaded tower is given the best backend, or the one that is named; it may be one that cannot pack."""
    asked = recipe().with_model(vision=True)
    assert [slot.name for slot in asked.compile().draft.slots] == ["full", "linear", "vision"]
    assert '"auto" chose sdpa' in one(asked, "attention.vision", "note")
    named = asked.with_attention(vision=Windowed(supports_packing=False)).with_data(DATA.pack())
    assert named.compile(strict=False).draft.backends["vision"] == Windowed(supports_packing=False)
    assert found(named, "data.packing") == []
    assert "no backend is called 'sdp'" in one(asked.with_attention(vision="sdp"), "attention.vision")


def test_attention_of_a_tower_that_is_not_loaded_is_an_error():
    """A slot that would be ignored is refused."""
    message = one(recipe().with_attention(vision="eager"), "attention.vision")
    assert "'eager' would attend in a tower that is not loaded" in message
    assert "Fix: recipe.with_model(vision=True), or leave vision out" in message


def test_a_backend_that_means_to_differ_is_named():
    """Where no reference can prove the numbers the plan says so."""

    class Different(Windowed):
        exact = False

    notes = found(recipe().with_attention(full=Different(supports_packing=True)), "attention.full", "note")
    assert "isolation is verified, its numbers are not" in notes[0]


def test_code_from_the_network_is_listed():
    """A backend that fetches code says where from, and the plan says it too."""

    class Fetched(Windowed):
        remote_code = "org/name@0123"

    notes = found(recipe().with_attention(full=Fetched(supports_packing=True)), "attention.full", "note")
    assert "attention.full: runs code from the hub: org/name@0123" in notes


@pytest.mark.parametrize(
    ("slot", "name", "reason"),
    [
        ("full", "flash_attention_2", "it needs an NVIDIA GPU"),
        ("full", "flash_attention_4", "it needs an NVIDIA GPU"),
        ("linear", "fla", "it needs an NVIDIA GPU"),
        ("linear", "transformers", "transformers chooses flash-linear-attention wherever it can be imported"),
    ],
)
def test_a_named_backend_that_cannot_run_here_blocks(slot, name, reason):
    """It is right elsewhere: the plan is returned, says why it cannot run here, and replaces nothing."""
    asked = recipe(ModelSpec("qwen3.5-4b", dtype="float32" if slot == "linear" else "bfloat16"))
    plan = asked.with_attention(**{slot: name}).compile(strict=False)
    (finding,) = [f for f in plan.findings if f.level == "blocked" and f.place == f"attention.{slot}"]
    assert finding.problem.startswith(f"{name} is not available: {reason}")
    assert plan.draft.backends[slot].name == name


def test_flash_attention_refuses_a_float32_model():
    """Kernels of 16 bits and a model of 32 are an error on any machine, with the line that mends it."""
    asked = recipe(ModelSpec("qwen3.5-4b", dtype="float32")).with_attention(full="flash_attention_3")
    message = one(asked, "attention.full", machine=GPU)
    assert message == (
        "attention.full: flash_attention_3 computes in 16 bits only, the model in float32\n"
        '     Fix: dtype="bfloat16"'
    )


def test_head_dim_256_is_refused_by_name_where_a_version_cannot(monkeypatch):
    """The message says the head dim, what is taken, and on which GPUs."""
    from packaging.version import Version

    monkeypatch.setattr("qwenft.backends.flash.installed", lambda *_: Version("99"))
    consumer = Machine.named("RTX5090")
    message = one(recipe().with_attention(full="flash_attention_4"), "attention.full", machine=consumer)
    assert "flash_attention_4 cannot: head dim 256: it takes multiples of 32 up to 128" in message
    assert found(recipe().with_attention(full="flash_attention_4"), "attention.full", machine=GPU) == []


def test_packing_with_the_stock_rule_is_an_error():
    """Stock transformers cannot keep packed documents apart; a plan that asks for it is refused."""
    asked = recipe(data=DATA.pack()).with_attention(linear="transformers")
    message = one(asked, "data.packing")
    assert "attention.linear = StockDeltaRule() has supports_packing = False" in message


def test_a_hub_kernel_is_pinned_and_listed():
    """Named with a commit it is planned, and said to be code from the hub; without one it is refused."""
    commit = "0123456789" * 4
    asked = recipe().with_attention(full=f"kernels-community/flash-attn2@{commit}")
    notes = found(asked, "attention.full", "note", machine=GPU)
    assert f"attention.full: runs code from the hub: kernels-community/flash-attn2@{commit}" in notes
    message = one(recipe().with_attention(full="kernels-community/flash-attn2"), "attention.full")
    assert "is code from the network" in message
    assert 'Fix: HubAttention("kernels-community/flash-attn2", revision=' in message


def test_auto_takes_what_is_best_on_a_gpu(monkeypatch):
    """With the packages at hand "auto" takes flash attention for the GPU it is for, and FLA."""
    from packaging.version import Version

    monkeypatch.setattr("qwenft.backends.flash.installed", lambda *_: Version("99"))
    monkeypatch.setattr("qwenft.backends.fla.installed", lambda *_: Version("99"))
    for machine, full in (("H100-80GB", "flash_attention_3"), ("A100-80GB", "flash_attention_2")):
        chosen = recipe(data=DATA.pack()).compile(Machine.named(machine), strict=False).draft.backends
        assert {slot: backend.name for slot, backend in chosen.items()} == {"full": full, "linear": "fla"}
    chosen = recipe(ModelSpec("qwen3.5-4b", dtype="float32")).compile(GPU, strict=False).draft.backends
    assert {slot: backend.name for slot, backend in chosen.items()} == {"full": "sdpa", "linear": "torch"}
