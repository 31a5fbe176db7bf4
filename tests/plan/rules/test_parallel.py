"""What several processes share, and what they cannot."""

import pytest

from qwenft.machine import Machine
from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.model import ModelSpec
from qwenft.specs.parallel import ParallelSpec
from qwenft.specs.training import TrainingSpec

from .helpers import DATA, found, one, recipe

CARDS = Machine.named("4xH100-80GB")
FSDP2, LORA = ParallelSpec.fsdp2(), AdapterSpec.lora()


def test_one_process_says_how_several_are_started():
    """A recipe for several is right in one, and its plan says that nothing is shared out."""
    asked = recipe(data=DATA, parallel=FSDP2)
    text = one(asked, "parallel", "note")
    assert "in one process nothing is shared out; plan.launch(run_dir, processes=2)" in text
    assert found(asked, "parallel", "note", CARDS) == []
    assert found(recipe(data=DATA), "parallel", "note") == []


def test_a_recipe_for_one_process_is_refused_in_several(monkeypatch):
    """Each of them would train all of it."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    text = one(recipe(data=DATA), "parallel", "error")
    assert "4 processes were started, and the recipe is for one" in text
    assert "Fix: recipe.with_parallel(ParallelSpec.fsdp2()), or one process" in text
    assert found(recipe(data=DATA, parallel=FSDP2), "parallel", "error") == []


@pytest.mark.parametrize("kind", ["single", "ddp"])
@pytest.mark.parametrize(
    ("field", "value"), [("offload", "cpu"), ("reshard_after_forward", False), ("hybrid", True)]
)
def test_options_of_sharding_are_for_what_is_sharded(kind, field, value):
    """An option without effect is an error."""
    text = one(recipe(parallel=ParallelSpec(kind, **{field: value})), f"parallel.{field}", "error")
    assert f'"{kind}" shares no weight out\n     Fix: ParallelSpec.fsdp2({field}=...)' in text
    assert found(recipe(parallel=ParallelSpec("fsdp2", **{field: value})), f"parallel.{field}", "error") == []


@pytest.mark.parametrize(
    ("changes", "place", "text"),
    [
        (
            {"adapter": AdapterSpec.lora(initialization="pissa")},
            "adapter.initialization",
            '"pissa" takes the first pairs out of whole weights',
        ),
        (
            {"adapter": AdapterSpec.lora(dora=True), "model": ModelSpec("qwen3.5-4b").quantize("nf4")},
            "adapter.dora",
            "the lengths of the rows of embeddings and of quantized weights",
        ),
        (
            {"adapter": AdapterSpec.lora(dora=True).on("embeddings"), "model": ModelSpec("qwen3.5-9b")},
            "adapter.dora",
            "the lengths of the rows of embeddings and of quantized weights",
        ),
        (
            {"training": TrainingSpec(embeddings_on_host=True), "model": ModelSpec("qwen3.5-9b")},
            "training.embeddings_on_host",
            "embeddings that are shared out are gathered where the model computes",
        ),
    ],
)
def test_what_needs_a_weight_whole_is_refused_where_it_is_shared_out(changes, place, text):
    """One process, and several that repeat the model, have it whole."""
    asked = recipe(**{"data": DATA, **changes})
    assert text in one(asked.with_parallel(FSDP2), place, "error", CARDS)
    for parallel in (ParallelSpec.single(), ParallelSpec.ddp()):
        assert not [f for f in found(asked.with_parallel(parallel), place, "error", CARDS) if text in str(f)]


def test_plain_dora_is_shared_out():
    """The lengths of the rows of plain weights are read with them."""
    assert found(recipe(adapter=AdapterSpec.lora(dora=True), parallel=FSDP2), "adapter.dora", "error", CARDS) == []


def test_no_process_steps_before_its_gradients_are_added_up():
    """DistributedDataParallel adds gradients up behind backward."""
    training = TrainingSpec(optimizer_in_backward=True, max_grad_norm=None)
    asked = recipe(training=training, parallel=ParallelSpec.ddp())
    assert '"ddp" adds gradients up over the processes' in one(asked, "training.optimizer_in_backward", "error")
    assert found(asked.with_parallel(FSDP2), "training.optimizer_in_backward", "error") == []
