"""How values show themselves: in a notebook as HTML, and everywhere as text."""

from __future__ import annotations

import attrs
import pytest

import qwenft as qf
from qwenft.display import Line, html_chart

from ..training.helpers import recipe  # noqa: TID252 - as the tests beside it
from .test_html import SCRIPT, Reader


@pytest.fixture(scope="module")
def views(dense_checkpoint, tmp_path_factory):
    """Of every kind of value that is shown, one, whose texts hold markup wherever a user gives them."""
    asked = recipe(
        dense_checkpoint, adapter=qf.AdapterSpec.lora(rank=4), max_steps=3, held_out=0.2, keep_best=True
    )
    plan = asked.with_training(sample_prompts=(SCRIPT,)).compile()
    run = plan.train(tmp_path_factory.mktemp("views") / "<b>run", verbose=0)
    machine = attrs.evolve(qf.Machine.named("8xH100-80GB"), name=SCRIPT)
    values = {
        "model": qf.ModelSpec(SCRIPT).quantize("nf4"),
        "adapter": qf.AdapterSpec.lora(rank=4).on("mlp"),
        "attention": qf.AttentionSpec(full=qf.backends.FlexAttention()),
        "data": qf.DataSpec.messages([{"messages": [{"role": "user", "content": SCRIPT}]}]).with_columns(
            messages=SCRIPT
        ),
        "training": plan.recipe.training,
        "parallel": qf.ParallelSpec.fsdp2(),
        "recipe": plan.recipe,
        "machine": machine,
        "plan": plan,
        "findings": plan.findings,
        "coverage": plan.coverage,
        "data report": plan.data,
        "memory": plan.memory,
        "time": plan.forecast.roofline,
        "run": run,
    }
    return {name: (value, value._repr_html_(), repr(value)) for name, value in values.items()}


NAMES = [
    "model",
    "adapter",
    "attention",
    "data",
    "training",
    "parallel",
    "recipe",
    "machine",
    "plan",
    "findings",
    "coverage",
    "data report",
    "memory",
    "time",
    "run",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_view_is_whole_escaped_and_loads_nothing(views, name):
    """Tags are closed, nothing comes from elsewhere, no markup of the user's is markup, and there is a text twin."""
    _, html, text = views[name]
    assert "<script" not in html
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")
    reader = Reader()
    reader.feed(html)
    assert reader.opened == []
    assert reader.seen <= {
        "div",
        "strong",
        "span",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "svg",
        "polyline",
        "circle",
        "text",
    }
    assert text.strip()
    assert len(text) < 6000


def test_a_spec_is_shown_as_the_call_that_makes_it():
    """What is not said is left out, and what is printed can be run."""
    spec = qf.TrainingSpec(learning_rate=1e-4, epochs=2)
    assert repr(spec) == "TrainingSpec(epochs=2, learning_rate=0.0001)"
    assert repr(qf.TrainingSpec()) == "TrainingSpec()"
    names = {name: getattr(qf, name) for name in ("AdapterSpec", "DataSpec", "TrainingSpec", "ParallelSpec")}
    for value in (spec, qf.AdapterSpec.lora(rank=4).on("mlp"), qf.DataSpec.messages("a.jsonl").pack()):
        assert eval(repr(value), names) == value  # noqa: S307 - of our own


def test_what_a_view_says(views):
    """Each holds what a user looks for in it."""
    for name, words in {
        "machine": ("8 x 80.0 GiB", "bfloat16 989 TFLOP/s"),
        "memory": ("peak of live tensors", "activations", "needed"),
        "coverage": ("full_attention", "q_proj, k_proj, v_proj, o_proj", "frozen"),
        "findings": ("note", "attention.full"),
        "time": ("step", "tokens", "moved"),
        "data report": ("documents", "held out"),
        "run": ("loss", "finished"),
        "training": ("learning_rate", "by default"),
    }.items():
        _, html, text = views[name]
        for word in words:
            assert word in html, name
        assert words[0] in text, name


def test_a_chart_is_of_finite_points():
    """A line of one point or of none is nothing, but for dots, and what is not finite is no point of it."""
    assert html_chart(Line("loss", [])) == ""
    assert html_chart(Line("loss", [(1, 2.0), (2, float("nan"))])) == ""
    chart = html_chart(Line("loss", [(1, 2.0), (2, float("inf")), (3, 1.0)]), Line("held", [(2, 1.5)], "dots", 1))
    assert 'aria-label="loss from 2 to 1; held from 1.5 to 1.5"' in chart
    assert chart.count("<circle") == 1
    assert 'points="0.0,0.0 680.0,120.0"' in chart
