import json
import re
import sys

import pytest

from qwenft.capabilities import AttentionBackend, Availability, LinearAttentionBackend
from qwenft.errors import CheckpointError, PlanError, QwenftError
from qwenft.family.architectures import FAMILY
from qwenft.machine import Machine
from qwenft.plan.findings import Finding, blocked, error, note
from qwenft.plan.rules import RULES
from qwenft.recipe import Recipe
from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.attention import AttentionSpec
from qwenft.specs.data import DataSpec
from qwenft.specs.model import ModelSpec
from qwenft.specs.training import TrainingSpec

CHATS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}]
DATA = DataSpec.messages(CHATS)
GPU = Machine.named("H100-80GB")


class Windowed(AttentionBackend):
    """A full-attention backend that declares what a test needs."""

    name = "windowed"
    uses_flash_lib = False

    def __init__(self, supports_packing=False, needs_half_precision=False, usable=True, refusal=None):
        self.supports_packing = supports_packing
        self.needs_half_precision = needs_half_precision
        self.usable = usable
        self.refusal = refusal

    supports_packing = False

    def availability(self, machine):
        """As it was told."""
        return Availability(self.usable, f"no kernel for {machine.device}", "pip install windowed")

    def refuses(self, problem):
        """As it was told."""
        return self.refusal

    def attend(self, query, key, value, *, layout, scale, causal=True):
        """Never called by a plan."""
        raise NotImplementedError


class Forgetful(LinearAttentionBackend):
    """A linear-attention backend that cannot pack."""

    name = "forgetful"
    supports_packing = False
    uses_flash_lib = False

    def short_conv(self, *arguments, **options):
        """Never called by a plan."""
        raise NotImplementedError

    def delta_rule(self, *arguments, **options):
        """Never called by a plan."""
        raise NotImplementedError


def recipe(model="qwen3.5-4b", **specs):
    return Recipe(model if isinstance(model, ModelSpec) else ModelSpec(model), **specs)


def found(asked, place, level="error", machine=None):
    """The findings of this level and place, as text."""
    findings = asked.compile(machine, strict=False).findings
    return [str(finding) for finding in findings if (finding.level, finding.place) == (level, place)]


def one(asked, place, level="error", machine=None):
    (finding,) = found(asked, place, level, machine)
    return finding


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a config.json and an empty file of weights: no rule reads more of it."""

    def write(architecture=None, **changes):
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        config = (architecture or FAMILY["qwen3.5-4b"]).to_config() | changes
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").touch()
        return folder

    return write


@pytest.mark.parametrize("name", FAMILY)
def test_the_plain_recipe_has_no_error(name):
    """A model and data alone are right for every size, packed and not."""
    for data in (None, DATA, DATA.pack(), DATA.hold_out(0.5)):
        plan = recipe(name, data=data).compile()
        assert {finding.level for finding in plan.findings} <= {"blocked", "note"}


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


@pytest.mark.parametrize(
    ("data", "training", "place", "text"),
    [
        (
            DATA.with_max_length(300_000),
            TrainingSpec(),
            "data.max_length",
            "300,000 tokens are more than the 262,144 that the model reads\n     Fix: .with_max_length(262144)",
        ),
        (
            DATA.with_max_length(512).pack(256),
            TrainingSpec(),
            "data.row_tokens",
            "a row of 256 tokens cannot hold a document of max_length = 512\n     Fix: .pack(row_tokens=512)",
        ),
        (
            DATA.with_max_length(512),
            TrainingSpec(tokens_per_step=511),
            "training.tokens_per_step",
            "a step of 511 tokens cannot hold a row of 512\n     Fix: tokens_per_step=512, or .with_max_length(511)",
        ),
    ],
)
def test_lengths_that_do_not_fit(data, training, place, text):
    """Documents must fit the model, rows the documents, and steps the rows."""
    assert one(recipe(data=data, training=training), place) == f"{place}: {text}"


def test_lengths_that_just_fit():
    """The limits themselves are no error."""
    fitting = DATA.with_max_length(262_144).pack(262_144)
    plan = recipe(data=fitting, training=TrainingSpec(tokens_per_step=262_144)).compile()
    assert [f for f in plan.findings if f.level == "error"] == []


def test_evaluation_needs_held_out_data():
    """evaluate_every without held-out data is an error, and with it none."""
    training = TrainingSpec(evaluate_every=5)
    text = "training.evaluate_every: there is no held-out data to evaluate\n     Fix: data.hold_out(0.05)"
    for data in (None, DATA):
        assert one(recipe(data=data, training=training), "training.evaluate_every") == text
    assert found(recipe(data=DATA.hold_out(0.5), training=training), "training.evaluate_every") == []


def test_a_run_needs_weights_data_and_this_machine(checkpoint):
    """A name without weights, no data and another machine block a run, and a checkpoint with data does not."""
    asked = recipe("qwen3.5-4b")
    assert one(asked, "model.source", "blocked").startswith(
        "model.source: 'qwen3.5-4b' names an architecture and no weights\n"
        '     Fix: ModelSpec("Qwen/Qwen3.5-4B") or a checkpoint folder',
    )
    assert one(asked, "data", "blocked").startswith(
        "data: there is nothing to train on\n     Fix: recipe.with_data(",
    )
    assert one(asked, "machine", "blocked", GPU) == (
        "machine: the plan is for H100-80GB, not for this machine\n     Fix: recipe.compile()"
    )
    runnable = recipe(ModelSpec(checkpoint()), data=DATA)
    assert {f.level for f in runnable.compile(Machine.detect()).findings} == {"note"}
    assert found(recipe("Qwen/Qwen3.5-4B", data=DATA), "model.source", "blocked") == []


def test_what_long_rows_lose_is_told():
    """Dropping and truncating are noted; stopping with an error loses nothing."""
    text = "data.overflow: rows longer than 64 tokens are {} and counted"
    assert one(recipe(data=DATA.with_max_length(64)), "data.overflow", "note") == text.format("left out")
    assert one(recipe(data=DATA.with_max_length(64, "truncate")), "data.overflow", "note") == text.format(
        "cut behind a message"
    )
    assert found(recipe(data=DATA.with_max_length(64, "error")), "data.overflow", "note") == []


@pytest.mark.parametrize("place", ["data.source", "data.held_out.source"])
def test_the_head_of_each_source_is_checked(place, tmp_path):
    """Wrong rows at the head of the data and of the held-out data are findings of the plan."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": [{"role": "critic", "content": "Bad."}]}\n')
    bad = DataSpec.messages([str(path)])
    text = one(recipe(data=bad if place == "data.source" else DATA.hold_out(bad)), place)
    assert text.startswith(
        f"{place}: {path}, row 1: messages[0]: expected a role of system, user, assistant, tool",
    )


def test_all_that_is_wrong_is_raised_at_once():
    """The error numbers every problem of the recipe, each with place and remedy, and carries them."""
    asked = recipe(
        "qwen3.5-27b",
        data=DATA.with_max_length(64).pack(),
        adapter=AdapterSpec.lora().on("full_attention", "routed_experts"),
        attention=AttentionSpec(full=Windowed()),
        training=TrainingSpec(tokens_per_step=9, evaluate_every=1),
    )
    with pytest.raises(PlanError) as caught:
        asked.compile()
    text = str(caught.value)
    assert text.startswith('4 problems in this recipe\n  1. adapter.on: "routed_experts" does not exist in')
    assert re.findall(r"^  (\d)\. ([\w.]+): ", text, re.MULTILINE) == [
        ("1", "adapter.on"),
        ("2", "data.packing"),
        ("3", "training.tokens_per_step"),
        ("4", "training.evaluate_every"),
    ]
    assert text.count("\n     Fix: ") == 4
    assert len(caught.value.findings) == 4
    assert all(finding.level == "error" for finding in caught.value.findings)
    assert isinstance(caught.value, QwenftError)
    assert isinstance(caught.value, ValueError)


def test_one_problem_is_one_problem():
    """A single problem is counted in the singular, and reads as the design shows it."""
    asked = recipe(data=DATA.pack(), attention=AttentionSpec(full=Windowed()))
    with pytest.raises(PlanError) as caught:
        asked.compile()
    assert str(caught.value) == (
        "1 problem in this recipe\n"
        "  1. data.packing: documents are packed, but attention.full = "
        "Windowed(supports_packing=False, needs_half_precision=False, usable=True, refusal=None) "
        "has supports_packing = False,\n"
        "     so a token could attend to another document.\n"
        '     Fix: recipe.with_data(data.unpack()), or .with_attention(full="auto").'
    )


def test_without_strict_the_plan_holds_the_errors():
    """compile(strict=False) returns the plan, whose run is refused with the same findings."""
    plan = recipe(adapter=AdapterSpec.lora().on("routed_experts")).compile(strict=False)
    assert [f.place for f in plan.findings if f.level == "error"] == ["adapter.on", "adapter"]
    with pytest.raises(PlanError, match=r"adapter\.on"):
        plan.prepare()


@pytest.mark.parametrize("start", ["prepare", "train", "data"])
def test_what_is_blocked_is_raised_when_it_is_to_run(start, tmp_path):
    """A plan that is right but not for here raises with what blocks it, and makes no folder."""
    plan = recipe("qwen3.5-4b").compile(GPU)
    run = {
        "prepare": plan.prepare,
        "train": lambda: plan.train(tmp_path / "run"),
        "data": lambda: plan.data,
    }[start]
    with pytest.raises(PlanError, match=r"^3 problems before this can run\n  1\. model\.source: ") as caught:
        run()
    assert [f.place for f in caught.value.findings] == ["model.source", "data", "machine"]
    assert not list(tmp_path.iterdir())


def test_a_run_folder_that_is_taken_is_told_before_the_plan_is_run(tmp_path):
    """train() into a folder that holds something is refused, whatever the plan."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"exists already, and is not overwritten"):
        recipe("qwen3.5-4b").compile().train(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_is_no_checkpoint(tmp_path, checkpoint):
    """A folder without config or weights, and one with a broken config, are refused with what is missing."""
    with pytest.raises(
        CheckpointError,
        match=r"is no checkpoint: it holds no config\.json\n  Fix: a checkpoint folder",
    ):
        recipe(ModelSpec(tmp_path)).compile()
    folder = checkpoint()
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"it holds no model\.safetensors or model\.safetensors\.index\.json",
    ):
        recipe(ModelSpec(folder)).compile()
    (folder / "model.safetensors").touch()
    for content, message in (
        ("{", "cannot be read"),
        ("[]", "expected a JSON object"),
        ("\xff", "cannot be read"),
    ):
        (folder / "config.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(CheckpointError, match=rf"config\.json: {message}") as caught:
            recipe(ModelSpec(folder)).compile()
        assert caught.value.path == folder / "config.json"


def test_a_checkpoint_of_another_family(checkpoint):
    """Another family is named, with the ones that can be trained."""
    folder = checkpoint(model_type="llama")
    with pytest.raises(CheckpointError, match=r"is a llama checkpoint; qwenft trains qwen3_5, qwen3_5_moe"):
        recipe(ModelSpec(folder)).compile()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "qwen3.5-28b",
            r"'qwen3\.5-28b' is neither a folder nor a hub id; did you mean 'qwen3\.5-\d+b'\?\n  Fix: ",
        ),
        ("no/such/folder", r"'no/such/folder' is neither a folder nor a hub id"),
        ("/no/such/folder", r"'/no/such/folder' is neither a folder nor a hub id"),
    ],
)
def test_a_source_that_is_nothing(source, message):
    """A name that is neither a folder, a hub id nor of the family is refused without asking a network."""
    with pytest.raises(CheckpointError, match=message) as caught:
        recipe(source).compile()
    assert caught.value.path == source


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    """A hub id that is not in the cache is refused offline, with what to check."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"'nobody/nothing' is no folder here, and the hub does not give it"):
        recipe("nobody/nothing").compile()


def test_every_rule_says_what_it_is_for():
    """Rules are functions with a sentence each, and none is listed twice."""
    assert len(set(RULES)) == len(RULES)
    assert all(rule.__doc__ for rule in RULES)


def test_findings_read_as_place_problem_and_fix():
    """A finding is a value whose text has its place, its problem, and its fix where it has one."""
    assert str(error("a.b", "is wrong", "mend it")) == "a.b: is wrong\n     Fix: mend it"
    assert str(note("a.b", "is so")) == "a.b: is so"
    assert error("a", "b", "c") == Finding("error", "a", "b", "c")


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

    monkeypatch.setattr("qwenft.backends.flash.installed", lambda _: Version("99"))
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

    monkeypatch.setattr("qwenft.backends.flash.installed", lambda _: Version("99"))
    monkeypatch.setattr("qwenft.backends.fla.installed", lambda _: Version("99"))
    for machine, full in (("H100-80GB", "flash_attention_3"), ("A100-80GB", "flash_attention_2")):
        chosen = recipe(data=DATA.pack()).compile(Machine.named(machine), strict=False).draft.backends
        assert {slot: backend.name for slot, backend in chosen.items()} == {"full": full, "linear": "fla"}
    chosen = recipe(ModelSpec("qwen3.5-4b", dtype="float32")).compile(GPU, strict=False).draft.backends
    assert {slot: backend.name for slot, backend in chosen.items()} == {"full": "sdpa", "linear": "torch"}


def custom_loss(hidden, batch, head):
    """A loss of one's own."""
    return head(hidden).sum() * batch.tokens


@pytest.mark.parametrize(
    ("training", "place", "text"),
    [
        (
            TrainingSpec(momentum=0.9),
            "momentum",
            '"adamw" has no momentum\n     Fix: optimizer="sgd", or no momentum',
        ),
        (
            TrainingSpec(optimizer="sgd", betas=(0.9, 0.95)),
            "betas",
            '"sgd" has no betas\n     Fix: optimizer="adamw"',
        ),
        (TrainingSpec(optimizer="sgd", epsilon=1e-6), "epsilon", '"sgd" has no epsilon'),
        (TrainingSpec(decay_ratio=0.2), "decay_ratio", '"cosine" has no decay of its own length'),
        (
            TrainingSpec(schedule="warmup_stable_decay", warmup_ratio=0.6, decay_ratio=0.5),
            "decay_ratio",
            "warmup and decay take 1.1 of the steps",
        ),
        (TrainingSpec(schedule="constant", floor_ratio=0.1), "floor_ratio", '"constant" never falls to a floor'),
        (TrainingSpec(loss=custom_loss, z_loss=1e-4), "z_loss", "custom_loss() is not told of it"),
        (
            TrainingSpec(loss=custom_loss, label_smoothing=0.1),
            "label_smoothing",
            "custom_loss() is not told of it",
        ),
        (
            TrainingSpec(loss="cce", z_loss=1e-4),
            "z_loss",
            '"cce" has none\n     Fix: loss="chunked", or no z_loss',
        ),
        (TrainingSpec(patience=2, evaluate_every=5), "patience", "there is no held-out data to judge by"),
        (TrainingSpec(keep_best=True), "keep_best", "there is no held-out data to judge by"),
        (TrainingSpec(patience=2), "patience", "early stopping needs evaluations on the way"),
        (
            TrainingSpec().with_learning_rate(routed_experts=1e-5),
            "with_learning_rate",
            '"routed_experts" has a learning rate but is not trained\n     Fix: .on("routed_experts")',
        ),
        (TrainingSpec(master_weights=True), "master_weights", "adapters are float32 already"),
    ],
)
def test_options_that_would_be_ignored(training, place, text):
    """A number that nothing would read, or that cannot be followed, is an error at its own place."""
    assert any(text in finding for finding in found(recipe(data=DATA, training=training), f"training.{place}"))


@pytest.mark.parametrize(
    "training",
    [
        TrainingSpec(optimizer="sgd", momentum=0.9),
        TrainingSpec(betas=(0.9, 0.95), epsilon=1e-6, floor_ratio=0.1),
        TrainingSpec(schedule="warmup_stable_decay", warmup_ratio=0.5, decay_ratio=0.5, floor_ratio=0.1),
        TrainingSpec(loss=custom_loss),
        TrainingSpec(z_loss=1e-4, label_smoothing=0.1, neftune_alpha=5, lora_plus_ratio=16),
        TrainingSpec().with_learning_rate(mlp=1e-5),
        TrainingSpec(evaluate_every=5, patience=2, keep_best=True),
    ],
)
def test_options_that_are_followed(training):
    """The same numbers where they are read are no error."""
    plan = recipe(data=DATA.hold_out(0.5), training=training).compile()
    assert {finding.level for finding in plan.findings} <= {"blocked", "note"}


def test_full_fine_tuning_has_other_options():
    """It has no B matrices, and master weights only beside bfloat16."""
    full = AdapterSpec.full()
    text = one(recipe(adapter=full, training=TrainingSpec(lora_plus_ratio=16.0)), "training.lora_plus_ratio")
    assert text.endswith("full fine-tuning has no B matrices\n     Fix: AdapterSpec.lora()")
    masters = TrainingSpec(master_weights=True)
    float32 = recipe(ModelSpec("qwen3.5-4b", dtype="float32"), adapter=full, training=masters)
    assert "weights are float32 already" in one(float32, "training.master_weights")
    assert found(recipe(adapter=full, training=masters), "training.master_weights") == []
    noted = one(recipe(adapter=full), "training.master_weights", "note")
    assert "trained in bfloat16, and updates rounded stochastically" in noted
    assert found(recipe(adapter=full, training=masters), "training.master_weights", "note") == []


def test_paging_needs_a_gpu():
    """Paged optimizers are blocked on a CPU, and not on a GPU."""
    paged = recipe(training=TrainingSpec(optimizer="paged_adamw_8bit"))
    text = one(paged, "training.optimizer", "blocked")
    assert text.endswith('has none\n     Fix: optimizer="adamw_8bit"')
    assert found(paged, "training.optimizer", "blocked", GPU) == []


LEVERS = TrainingSpec(activation_offloading=True, embeddings_on_host=True)


def test_nothing_is_kept_on_the_host_of_a_machine_that_has_no_other_memory():
    """What would stay in the memory it is in already is refused there, and followed on a GPU."""
    asked = recipe("qwen3.5-9b", data=DATA, training=LEVERS)
    for name in ("activation_offloading", "embeddings_on_host"):
        text = one(asked, f"training.{name}", "blocked")
        assert text.endswith(f"computes in host memory already\n     Fix: {name}=False")
        assert found(asked, f"training.{name}", "blocked", GPU) == []
        assert found(asked, f"training.{name}", machine=GPU) == []


@pytest.mark.parametrize(
    ("asked", "place", "text"),
    [
        (
            recipe(training=TrainingSpec(activation_offloading=True, activation_checkpointing=False)),
            "activation_offloading",
            "no layer is checkpointed\n     Fix: activation_checkpointing=True",
        ),
        (
            recipe(training=TrainingSpec(optimizer_in_backward=True)),
            "optimizer_in_backward",
            "clipping at 1 needs the norm of all gradients before the first update\n     Fix: max_grad_norm=None",
        ),
        (
            recipe(training=TrainingSpec(optimizer_in_backward=True, max_grad_norm=None, tokens_per_step=16_384)),
            "optimizer_in_backward",
            "a step of 16,384 tokens adds up the gradients of several rows\n     Fix: no tokens_per_step",
        ),
        (
            recipe("qwen3.5-0.8b", training=LEVERS),
            "embeddings_on_host",
            "the output head of qwen3.5-0.8b is the same weight",
        ),
        (
            recipe("qwen3.5-9b", training=LEVERS, adapter=AdapterSpec.full()),
            "embeddings_on_host",
            'the embeddings are trained, on the device\n     Fix: .freeze("embeddings")',
        ),
    ],
)
def test_levers_that_exclude_each_other(asked, place, text):
    """What cannot be had together is an error on any machine, with what to leave."""
    assert text in one(asked, f"training.{place}", machine=GPU)


def test_an_optimizer_in_backward_says_its_price():
    """Alone it is no error, and a note says what it gives up."""
    asked = recipe(training=TrainingSpec(optimizer_in_backward=True, max_grad_norm=None))
    assert found(asked, "training.optimizer_in_backward", machine=GPU) == []
    assert "other parameters have been updated" in one(asked, "training.optimizer_in_backward", "note", GPU)


def test_compilation_needs_a_compiler(monkeypatch):
    """Without one it is blocked where the run would be, and nowhere else."""
    asked = recipe(training=TrainingSpec(compile_elementwise=True))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    text = one(asked, "training.compile_elementwise", "blocked")
    assert text.endswith("none is found\n     Fix: install g++, or compile_elementwise=False")
    assert found(asked, "training.compile_elementwise", "blocked", GPU) == []
    monkeypatch.setenv("CXX", sys.executable)
    assert found(asked, "training.compile_elementwise", "blocked") == []


def test_what_does_not_repeat_on_a_gpu_is_told():
    """On CUDA a plan says that bits differ; asked for equal bits, it refuses a backend that does not promise them."""
    assert "differ in their last bits" in one(recipe(), "training.deterministic", "note", GPU)
    assert found(recipe(), "training.deterministic", "note") == []
    asked = recipe(training=TrainingSpec(deterministic=True))
    assert found(asked, "training.deterministic", "note", GPU) == []

    class Racing(Windowed):
        """A backend whose sums race."""

        deterministic = False

    racing = asked.with_attention(full=Racing(True))
    assert "promises no equal bits (deterministic = False)" in one(racing, "attention.full", "error", GPU)
    assert found(racing, "attention.full") == []


def test_samples_alone_may_be_asked_at_intervals():
    """Answers at intervals need no held-out data."""
    training = TrainingSpec(evaluate_every=5, sample_prompts=("Hi",))
    assert found(recipe(data=DATA, training=training), "training.evaluate_every") == []


def test_cut_cross_entropy_needs_a_gpu_and_a_head_that_is_not_trained():
    """Named where it cannot run, or would add a trained head up in 16 bits, it is refused; else its price is said."""
    asked = recipe(data=DATA, training=TrainingSpec(loss="cce"))
    assert "NVIDIA GPU of compute capability 8.0" in one(asked, "training.loss", "blocked", Machine.detect())
    assert "compute capability 8.0" in one(asked, "training.loss", "blocked", Machine.named("T4"))
    assert found(asked, "training.loss", machine=GPU) == found(asked, "training.loss", "blocked", GPU) == []
    assert "the hidden states up in 16 bits" in one(asked, "training.loss", "note", GPU)
    trained = recipe(data=DATA, training=TrainingSpec(loss="cce"), adapter=AdapterSpec.full())
    assert "trained output head up in 16 bits" in one(trained, "training.loss", machine=GPU)
    wide = recipe(ModelSpec("qwen3.5-4b", dtype="float32"), data=DATA, training=TrainingSpec(loss="cce"))
    assert '"cce" computes in 16 bits only' in one(wide, "training.loss", machine=GPU)


def test_a_loss_that_cannot_be_found_again_is_noted():
    """The plan says that the run folder will hold no recipe."""
    noted = one(recipe(training=TrainingSpec(loss=lambda hidden, *_: hidden.sum())), "training.loss", "note")
    assert "the run folder will hold no recipe.json" in noted
