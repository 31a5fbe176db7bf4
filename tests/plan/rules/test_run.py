"""Data, and what a run needs beside a right recipe."""

import re

import datasets
import pytest

from qwenft.machine import Machine
from qwenft.specs.data import DataSpec
from qwenft.specs.model import ModelSpec
from qwenft.specs.training import TrainingSpec

from .helpers import CHATS, DATA, GPU, found, one, recipe


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


STREAMED = DATA.stream()
ITERATED = DataSpec.messages(datasets.IterableDataset.from_generator(lambda: iter(CHATS)))


@pytest.mark.parametrize(
    ("data", "training", "place", "text"),
    [
        (
            STREAMED,
            {},
            "training.max_steps",
            r"how many steps an epoch has .*\n     Fix: TrainingSpec\(max_steps=",
        ),
        (STREAMED.hold_out(0.1), {"max_steps": 9}, "data.held_out", r"a fraction of 0\.1 cannot be picked out"),
        (DATA.hold_out(STREAMED), {}, "data.held_out", "is streamed, and evaluation reads all of it"),
        (STREAMED.mix(DATA), {"max_steps": 9}, "data.mixed", "cannot be mixed into streamed ones"),
        (
            ITERATED,
            {},
            "data.source",
            r"rows of IterableDataset can only be gone through.*\n     Fix: \.stream\(\)",
        ),
        (DATA.mix(ITERATED), {}, r"data.mixed[0]", "rows of IterableDataset can only be gone through"),
        (DATA.hold_out(ITERATED), {}, "data.held_out", "rows of IterableDataset can only be gone through"),
    ],
)
def test_what_cannot_be_streamed(data, training, place, text):
    """What would need all of a source is refused where it is streamed, and a source that can only be streamed elsewhere."""
    assert re.search(text, one(recipe(data=data, training=TrainingSpec(**training)), place))


def test_what_can_be_streamed():
    """Streamed data with a number of steps, and other data held out, are right."""
    for data in (STREAMED.hold_out(DATA), ITERATED.stream()):
        plan = recipe(data=data, training=TrainingSpec(max_steps=9)).compile(strict=False)
        assert not [finding for finding in plan.findings if finding.level == "error"]


def test_what_long_rows_lose_is_told():
    """Dropping and truncating are noted; stopping with an error loses nothing."""
    text = "data.overflow: rows longer than 64 tokens are {} and counted"
    assert one(recipe(data=DATA.with_max_length(64)), "data.overflow", "note") == text.format("left out")
    assert one(recipe(data=DATA.with_max_length(64, "truncate")), "data.overflow", "note") == text.format(
        "cut behind a message"
    )
    assert found(recipe(data=DATA.with_max_length(64, "error")), "data.overflow", "note") == []


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


def test_a_loss_that_cannot_be_found_again_is_noted():
    """The plan says that the run folder will hold no recipe."""
    noted = one(recipe(training=TrainingSpec(loss=lambda hidden, *_: hidden.sum())), "training.loss", "note")
    assert "the run folder will hold no recipe.json" in noted
