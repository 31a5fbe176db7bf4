"""The loop's numbers."""

import sys

import pytest

from qwenft.machine import Machine
from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.model import ModelSpec
from qwenft.specs.training import TrainingSpec

from .helpers import DATA, GPU, Windowed, found, one, recipe


def test_evaluation_needs_held_out_data():
    """evaluate_every without held-out data is an error, and with it none."""
    training = TrainingSpec(evaluate_every=5)
    text = "training.evaluate_every: there is no held-out data to evaluate\n     Fix: data.hold_out(0.05)"
    for data in (None, DATA):
        assert one(recipe(data=data, training=training), "training.evaluate_every") == text
    assert found(recipe(data=DATA.hold_out(0.5), training=training), "training.evaluate_every") == []


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


def test_a_dense_model_has_no_router_to_balance():
    """The load-balancing loss is for a mixture of experts."""
    training = TrainingSpec(router_aux_loss=0.001)
    assert "has no router" in one(recipe("qwen3.5-4b", training=training), "training.router_aux_loss")
    assert found(recipe("qwen3.5-35b-a3b", training=training), "training.router_aux_loss") == []
