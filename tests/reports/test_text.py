import json
from types import SimpleNamespace

import pytest

from qwenft.display import bytes_text, text_table
from qwenft.family.architectures import FAMILY
from qwenft.machine import Machine
from qwenft.recipe import Recipe
from qwenft.reports.text import render_run, training_text
from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.data import DataSpec
from qwenft.specs.model import ModelSpec
from qwenft.specs.training import TrainingSpec
from qwenft.testing import train_tokenizer

GPU = Machine.named("8xH100-80GB")


def chat(text):
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]}


@pytest.fixture
def folder(tmp_path):
    """A folder with a config and a tokenizer, all that counting needs, and an empty file of weights."""
    train_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(FAMILY["qwen3.5-4b"].to_config()))
    (tmp_path / "model.safetensors").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (3 * 2**20, "3.0 MiB"),
        (24 * 2**30, "24.0 GiB"),
        (2**41, "2048.0 GiB"),
    ],
)
def test_bytes_are_written_for_people(count, text):
    """Numbers of bytes have a unit that fits."""
    assert bytes_text(count) == text


def test_a_table_has_columns():
    """Columns are as wide as their longest cell, aligned left or right, with no blanks at the end."""
    assert text_table(("name", "count"), [("a", "1"), ("longer", "1,000")], right=(1,)) == (
        "name    count\na           1\nlonger  1,000"
    )
    assert text_table(("a", "b"), []) == "a  b"


def test_a_plan_says_what_it_is_for():
    """Model, machine, method, parameters, backends, state and data are in the text, each in a line."""
    recipe = Recipe(ModelSpec("qwen3.5-27b"), DataSpec.messages([chat("Hello!")]), AdapterSpec.lora(rank=8))
    plan = recipe.compile(GPU)
    text = plan.explain()
    lines = dict(line.split(None, 1) for line in text.splitlines() if line[:1].isalpha())
    assert lines["model"] == "qwen3.5-27b (text half, bfloat16)"
    assert lines["machine"] == "8xH100-80GB, assumed to have flash-linear-attention 0.6 and triton 3.7.1"
    held = sum(row.held for row in plan.coverage)
    assert lines["trained"] == f"LoRA rank 8: {plan.trained_parameters:,} parameters beside {held:,}"
    chosen = plan.draft.backends
    assert lines["attention"] == f"full = {chosen['full'].name}, linear = {chosen['linear'].name}"
    assert lines["data"] == "not yet computed (plan.data tokenises them)"
    assert lines["training"] == "adamw, learning rate 0.0002 (cosine); gradients clipped at 1; loss chunked"
    one = plan.state.trained + plan.state.optimizer
    kept = f"2 kept: {bytes_text(2 * one)}"
    assert lines["disk"] == f"a checkpoint of {bytes_text(one)} every tenth of the run, {kept}"
    best = recipe.with_training(keep_best=True, save_every=500).compile(GPU, strict=False).explain()
    assert f"every 500 steps, 3 kept: {bytes_text(3 * one)}" in best
    assert lines["state"].startswith(f"{bytes_text(plan.state.total)}: frozen weights ")
    for row in plan.coverage:
        assert f"{row.role} " in text
        assert f"{row.parameters:,}" in text
        assert f"{row.held:,}" in text
    for finding in plan.findings:
        assert str(finding) in text
    assert "blocked here: machine: the plan is for 8xH100-80GB" in text
    assert 'note: attention.full: "auto" chose sdpa' in text
    assert repr(plan) == text


def test_a_plan_says_what_is_unusual():
    """A tower, another precision, full fine-tuning and missing data are told."""
    slow = Machine("old laptop", "cpu", cores=2, host_bytes=2**33)
    text = Recipe(ModelSpec("qwen3.5-0.8b").with_vision(), adapter=AdapterSpec.full()).compile(slow).explain()
    assert "(with vision tower, bfloat16, computed in float32)" in text
    assert "full fine-tuning: " in text
    assert "\ndata        none\n" in text


def test_memory_levers_are_told():
    """Each of them is in the text of the plan."""
    training = TrainingSpec(
        activation_checkpointing=2,
        activation_offloading=True,
        optimizer_in_backward=True,
        max_grad_norm=None,
        embeddings_on_host=True,
    )
    text = Recipe(ModelSpec("qwen3.5-27b"), training=training).compile(GPU).explain()
    assert "activations one layer in 2 computed again in backward, its input kept on the host until then" in text
    assert "adamw in backward, " in text
    assert "; 2.4 GiB more on the host" in text
    kept = Recipe(ModelSpec("qwen3.5-27b"), training=TrainingSpec(activation_checkpointing=False))
    assert "activations kept for backward" in kept.compile(GPU).explain()
    assert "every layer computed again in backward, its input kept\n" in Recipe(kept.model).compile(GPU).explain()


def test_errors_are_in_the_text_of_a_plan_that_is_not_strict():
    """A plan compiled with strict=False shows its errors as such."""
    recipe = Recipe(ModelSpec("qwen3.5-4b"), adapter=AdapterSpec.lora().on("router"))
    text = recipe.compile(strict=False).explain()
    assert 'error: adapter.on: "router" does not exist in qwen3.5-4b (dense)' in text


def test_counted_data_are_told(folder):
    """After plan.data the text gives documents, tokens, rows, steps, and what was lost."""
    rows = [
        chat("Hello!"),
        chat("Good day. " * 100),
        chat("Yes."),
        chat("No."),
        {"messages": [{"role": "user", "content": "?"}]},
    ]
    data = DataSpec.messages(rows).with_max_length(64).pack().hold_out(0.3)
    plan = Recipe(ModelSpec(folder), data).compile()
    assert not plan.data_is_known
    report = plan.data
    assert plan.data_is_known
    line = next(line for line in plan.explain().splitlines() if line.startswith("data "))
    assert f"2 documents, {report.tokens:,} tokens, {report.supervised:,} of them supervised; " in line
    assert (
        f"1 rows filled to {report.fill:.0%}; 1 steps; 1 documents held out; 1 rows dropped, 1 rows untrained"
        in line
    )
    lost = report.lost_tokens
    assert lost == report.read_tokens - sum(len(d) for d in plan._corpus.train.documents) - len(
        plan._corpus.held_out.documents[0]
    )
    assert f"1 rows untrained; {lost / report.read_tokens:.1%} of the tokens lost" in line
    lines = dict(line.split(maxsplit=1) for line in plan.explain().splitlines()[:14] if line.strip())
    assert lines["lengths"].endswith(f" up to {report.lengths[-1][0]:,} tokens")
    assert sum(count for _, count in report.lengths) == 5
    assert lines["tokens"].startswith("written to ")
    assert plan.summary()["data"]["dropped"] == 1
    assert json.loads(json.dumps(plan.summary()))["trained_parameters"] == plan.trained_parameters


def test_a_run_reads_in_a_line(tmp_path):
    """Steps, folder, loss and held-out loss of a run, first and last."""
    history = [
        {"step": 0, "held_out_loss": 5.0},
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": 2.5, "held_out_loss": 3.0},
    ]
    run = SimpleNamespace(
        folder=tmp_path, history=history, held_out_losses=[(0, 5.0), (2, 3.0)], ending="finished", best_step=None
    )
    assert render_run(run) == f"run of 2 steps in {tmp_path}, loss 4.0000 to 2.5000, held out 5.0000 to 3.0000"
    run.best_step = 1
    assert render_run(run).endswith("3.0000, with the weights of step 1, the best")
    run = SimpleNamespace(folder=tmp_path, history=[], held_out_losses=[], ending="finished", best_step=None)
    assert render_run(run) == f"run of 0 steps in {tmp_path}"


def test_the_training_is_told_with_all_that_differs():
    """Rates of roles, LoRA+, noise, smoothing, z-loss, decay, clipping and a loss of one's own are in one line."""

    def my_loss(hidden, batch, head):
        return head(hidden).sum() * batch.tokens

    training = TrainingSpec(
        optimizer="adamw_8bit",
        schedule="warmup_stable_decay",
        lora_plus_ratio=16.0,
        neftune_alpha=5.0,
        weight_decay=0.01,
        max_grad_norm=None,
        loss=my_loss,
    ).with_learning_rate(mlp=1e-5)
    assert training_text(training) == (
        "adamw_8bit, learning rate 0.0002, mlp 1e-05 (warmup_stable_decay); LoRA+ ratio 16; NEFTune alpha 5; "
        "weight decay 0.01; loss my_loss()"
    )
    assert "label smoothing 0.1; z-loss 0.0001" in training_text(TrainingSpec(label_smoothing=0.1, z_loss=1e-4))
