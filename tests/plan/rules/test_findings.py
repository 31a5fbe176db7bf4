"""How what the rules find is told."""

import re

import pytest

from qwenft.errors import CheckpointError, PlanError, QwenftError
from qwenft.family.architectures import FAMILY
from qwenft.plan.findings import Finding, error, note
from qwenft.plan.rules import RULES
from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.attention import AttentionSpec
from qwenft.specs.data import DataSpec
from qwenft.specs.model import ModelSpec
from qwenft.specs.training import TrainingSpec

from .helpers import DATA, GPU, Windowed, one, recipe


@pytest.mark.parametrize("name", FAMILY)
def test_the_plain_recipe_has_no_error(name):
    """A model and data alone are right for every size, packed and not."""
    for data in (None, DATA, DATA.pack(), DATA.hold_out(0.5)):
        plan = recipe(name, data=data).compile()
        assert {finding.level for finding in plan.findings} <= {"blocked", "note"}


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
