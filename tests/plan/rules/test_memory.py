"""What saves memory."""

import pytest

from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.training import TrainingSpec

from .helpers import DATA, GPU, found, one, recipe

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
