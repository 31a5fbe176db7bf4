"""Pictures of runs and plans."""

from __future__ import annotations

import math

import pytest

import qwenft as qf
from qwenft.reports.plots import PLAN, RUN, smoothed

from ..training.helpers import recipe  # noqa: TID252 - as the tests beside it

LORA = qf.AdapterSpec.lora(rank=4)


@pytest.fixture(scope="module")
def run(moe_checkpoint, tmp_path_factory):
    """A run of a mixture of experts with held-out data."""
    asked = recipe(moe_checkpoint, adapter=LORA, max_steps=6, held_out=0.2, evaluate_every=2)
    return asked.compile().train(tmp_path_factory.mktemp("plots") / "run", verbose=0)


def lines(figure):
    """Of every panel the lines, as lists of points."""
    return [[list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()] for axes in figure.axes]


@pytest.mark.parametrize("name", RUN)
def test_every_panel_of_a_run_is_drawn(run, name):
    """Each has an axis with its unit, and a point for every step."""
    figure = run.plot(name)
    assert figure._repr_png_().startswith(b"\x89PNG")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "step"
    assert axes.get_ylabel()
    assert [step for step, _ in lines(figure)[0][0]] == [1, 2, 3, 4, 5, 6]


def test_panels_stand_below_each_other(run):
    """As many as are named, in that order; the loss where none is."""
    assert [axes.get_ylabel() for axes in run.plot("rate", "gradient").axes] == ["learning rate", "gradient norm"]
    raw, smooth, held_out = lines(run.plot())[0]
    assert raw == [(record["step"], record["loss"]) for record in run.history if "loss" in record]
    assert smooth[0] == raw[0]
    assert held_out == run.held_out_losses


@pytest.mark.parametrize("name", PLAN)
def test_every_panel_of_a_plan_is_drawn(run, name):
    """Its data and its memory have pictures too."""
    figure = run.plan.plot(name)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert figure.axes[0].patches


def test_a_panel_that_there_is_not(run, dense_checkpoint, tmp_path):
    """It is refused with the nearest; of a dense model there are no experts to draw."""
    with pytest.raises(qf.SpecError, match=r"plot\('los'\): expected one of loss, .*; did you mean 'loss'"):
        run.plot("los")
    dense = recipe(dense_checkpoint, adapter=LORA, max_steps=1).compile().train(tmp_path / "run", verbose=0)
    with pytest.raises(qf.SpecError, match="the model has no routed experts"):
        dense.plot("experts")
    assert [line[-1][0] for line in lines(run.compare(dense))[0][::2]] == [6, 1]


def test_runs_are_compared_by_their_folders(run, tmp_path):
    """A run or a folder, told by their names; what holds no run is refused."""
    figure = run.compare(run.folder)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [str(run.folder)]
    with pytest.raises(qf.CheckpointError, match="is no folder of a run"):
        run.compare(tmp_path)


def test_a_smoothed_curve_begins_where_the_other_does():
    """It is the mean of the values so far, weighted towards the last; of few values each is its own."""
    assert smoothed([]) == []
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    found = smoothed([4.0, 2.0, *[3.0] * 398])
    assert found[0] == 4.0
    assert math.isclose(found[1], (0.95 * 4 + 2) / 1.95)
    assert smoothed([4.0, 2.0, 1.0]) == [4.0, 2.0, 1.0]
    assert math.isclose(smoothed([4.0, 2.0, *[3.0] * 38])[1], (0.5 * 4 + 2) / 1.5)
