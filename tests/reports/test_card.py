"""The model card, of runs whose numbers are given."""

from __future__ import annotations

import re
from types import SimpleNamespace

import attrs
import pytest
import yaml

from qwenft.machine import Machine
from qwenft.recipe import Recipe
from qwenft.reports.card import Place, base_name, render_card
from qwenft.reports.text import BARS
from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.data import DataSpec
from qwenft.specs.model import ModelSpec
from qwenft.specs.training import TrainingSpec

GPU = Machine.named("8xH100-80GB")
VERSIONS = {"python": "3.11.7", "qwenft": "0.1.0"}
HISTORY = [
    {"step": 0, "held_out_loss": 3.0, "held_out_perplexity": 20.0855, "held_out_accuracy": 0.25},
    {"step": 1, "loss": 2.5, "stream_tokens": 1000, "seconds": 40.0},
    {"step": 2, "loss": 2.0, "stream_tokens": 1000, "seconds": 30.0}
    | {"held_out_loss": 2.25, "held_out_perplexity": 9.4877, "held_out_accuracy": 0.5},
    {"step": 3, "loss": 1.0, "stream_tokens": 500, "seconds": 20.0}
    | {"held_out_loss": 2.75, "held_out_perplexity": 15.6426, "held_out_accuracy": 0.375},
]
COUNTS = dict.fromkeys(("dropped", "truncated", "split", "untrained", "lost_tokens", "vision_tokens"), 0) | {
    "window": None, "documents": 9, "tokens": 90, "supervised": 30, "stream_rows": 1, "fill": 0.9,
    "steps": 3, "held_out": 1, "skipped": (), "lost": (), "read_tokens": 90,
}  # fmt: skip


def counted(plan, data=(("/home/alice/chats.jsonl", "9 documents, 90 tokens, sha256 abc"),)):
    """A plan as if its data had been counted and its weights been read."""
    plan.__dict__["_corpus"] = SimpleNamespace(report=SimpleNamespace(**COUNTS))
    plan.__dict__["identity"] = {"weights": {"model.safetensors": "5 bytes, sha256 def"}, "data": dict(data)}
    return plan


def run_of(source="Qwen/Qwen3.5-27B", *, adapter=None, data=None, history=HISTORY, digests=None, **changes):
    rows = DataSpec.messages("/home/alice/chats.jsonl") if data is None else data
    training = TrainingSpec(max_steps=3, evaluate_every=1, sample_prompts=("My secret?",))
    recipe = Recipe(
        ModelSpec(source), rows.pack().hold_out(0.1), adapter or AdapterSpec.lora(rank=8), training=training
    )
    plan = recipe.compile(GPU, strict=False)
    plan = counted(plan) if digests is None else counted(plan, digests)
    return SimpleNamespace(
        **{"plan": plan, "history": history, "best_step": None, "ending": "finished", **changes}
    )


def card(run, place=None, *, adapter=True, terms=None):
    return render_card(
        run, place or Place("me/bot"), adapter=adapter, environment={"versions": VERSIONS}, terms=terms or {}
    )


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def rows(text):
    """The cells of every line of a table."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [tuple(re.split(r" (?<!\\)\| ", line[2:-2])) for line in lines]


def test_the_header_is_what_the_hub_reads():
    """Base, relation, library, task, metrics and license are in the metadata."""
    assert header(card(run_of(), terms={"license": "apache-2.0"})) == {
        "base_model": "Qwen/Qwen3.5-27B",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "metrics": ["perplexity", "accuracy"],
        "pipeline_tag": "text-generation",
        "tags": ["qwenft", "lora"],
    }
    whole = header(card(run_of(adapter=AdapterSpec.full()), adapter=False))
    assert whole["base_model_relation"] == "finetune"
    assert whole["library_name"] == "transformers"
    assert whole["tags"] == ["qwenft"]


def test_a_base_in_a_folder_is_named_without_its_path(dense_checkpoint):
    """Such a base is in the text by its name, and not in the metadata, which the hub would refuse."""
    run = run_of(dense_checkpoint)
    text = card(run)
    assert not {"base_model", "base_model_relation"} & header(text).keys()
    assert base_name(run.plan) == "checkpoint"
    assert "for `checkpoint`, which is not on the hub" in text
    assert 'from_pretrained("checkpoint", dtype="bfloat16")  # a folder of your own' in text
    assert str(dense_checkpoint.parent) not in text


def test_results_are_those_of_the_weights():
    """Losses at the start and at the end, or at the best step where its weights are kept."""
    found = rows(card(run_of()))
    assert ("", "at the start", "at step 3") in found
    assert ("training loss (nats a token)", "2.5000", "1.0000") in found
    assert ("held-out loss", "3.0000", "2.7500") in found
    best = rows(card(run_of(best_step=2)))
    assert ("", "at the start", "at step 2, the best") in best
    assert ("training loss (nats a token)", "2.5000", "2.0000") in best
    assert ("held-out perplexity", "20.0855", "9.4877") in best
    assert ("held-out accuracy", "0.2500", "0.5000") in best
    text = card(run_of(ending="stopped early"))
    assert "3 steps on 2,500 tokens took 1:30 on 8xH100-80GB; the run stopped early." in text


def test_a_run_without_held_out_data_has_a_card():
    """Only training losses are there then."""
    history = [record for record in HISTORY if record["step"] == 1]
    text = card(run_of(history=history))
    assert "metrics" not in header(text)
    assert "held-out" not in text
    assert f"training {BARS[1]} 2.500 to 2.500, steps 1 to 1" in text


def test_the_curve_is_drawn():
    """In bars, and as a picture where there is one; a long run fits a line."""
    assert f"training {BARS[8]}▆▁ 2.500 to 1.000, steps 1 to 3\nheld out █▁▆ 3.000" in card(run_of())
    assert "![" not in card(run_of())
    assert "![Loss over the steps](loss.png)" in card(run_of(), Place("me/bot", picture="loss.png"))
    many = [{"step": n, "loss": 1 / n, "stream_tokens": 1, "seconds": 1.0} for n in range(1, 1001)]
    (line,) = re.findall("training ([▁-█]+) ", card(run_of(history=many)))
    assert 30 < len(line) <= 60


def test_plan_settings_and_versions_are_told():
    """Coverage, what is set of adapter and training, backends, digests and versions are in tables; prompts are not."""
    run = run_of()
    text = card(run)
    found = rows(text)
    for row in run.plan.coverage:
        assert any(line[0] == row.role and line[3] == f"{row.parameters:,}" for line in found)
    for line in (
        ("rank", "8"),
        ("learning rate", "0.0002"),
        ("seed", "0"),
        ("betas", "0.9, 0.999"),
        ("full attention", f"`{run.plan.draft.backends['full'].name}`"),
        ("model.safetensors", "5 bytes, sha256 def"),
        ("python", "3.11.7"),
        ("plan", run.plan.fingerprint),
    ):
        assert line in found
    assert "z loss" not in text
    assert "secret" not in text
    ranked = card(run_of(adapter=AdapterSpec.lora().with_rank(mlp=4).on("mlp", "full_attention")))
    assert ("ranks", "mlp 4") in rows(ranked)
    frozen = card(run_of(adapter=AdapterSpec.full().freeze("embeddings")), adapter=False)
    assert ("frozen", "embeddings") in rows(frozen)


def custom(hidden, batch, head):
    """A loss of one's own."""


def test_a_loss_of_ones_own_is_named():
    """By the name of its function."""
    run = run_of()
    run.plan = counted(run.plan.recipe.with_training(loss=custom).compile(GPU, strict=False))
    assert ("loss", "custom()") in rows(card(run))


def test_data_are_named_without_their_paths():
    """Files by their names, data sets of the hub by their ids, a bar in a name escaped; many files are counted."""
    digests = {"/home/alice/a|b.jsonl": "one", "org/chats, train": "two", "held out, /home/alice/c.jsonl": "three"}
    data = DataSpec.messages("/home/alice/*.jsonl").mix(DataSpec.messages("org/chats", split="train"))
    text = card(run_of(data=data, digests=digests))
    assert header(text)["datasets"] == ["org/chats"]
    assert {("a\\|b.jsonl", "one"), ("org/chats, train", "two"), ("held out, c.jsonl", "three")} <= set(rows(text))
    assert "alice" not in text
    many = {f"/data/{number}.jsonl": str(number) for number in range(25)}
    more = card(run_of(digests=many))
    assert ("15 more", "") in rows(more)
    (whole,) = set(re.findall("Fingerprint `(.*)`", more)) - set(re.findall("Fingerprint `(.*)`", text))
    changed = card(run_of(digests={**many, "/data/24.jsonl": "other"}))
    assert whole not in changed


@pytest.mark.parametrize("revision", [None, "abc"])
def test_the_code_names_base_and_branch(revision):
    """Revisions of the base and of the result are those that are loaded."""
    run = run_of()
    run.plan.recipe = attrs.evolve(run.plan.recipe, model=attrs.evolve(run.plan.recipe.model, revision=revision))
    text = card(run, Place("me/bot", "v2"))
    at = ', revision="abc"' if revision else ""
    assert f'.from_pretrained("Qwen/Qwen3.5-27B"{at}, dtype="bfloat16")\n' in text
    assert 'PeftModel.from_pretrained(base, "me/bot", revision="v2")' in text
    whole = card(run, adapter=False)
    assert 'AutoModelForImageTextToText.from_pretrained("me/bot", dtype="bfloat16")' in whole
    assert "The whole model, with LoRA of rank 8 merged in, made of [Qwen" in whole
