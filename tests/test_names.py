"""What people type: names that are completed, and arguments that are called otherwise elsewhere."""

from __future__ import annotations

import inspect

import pytest

import qwenft as qf
from qwenft.training_plan import TrainingPlan


def test_every_public_name_is_completed_and_documented():
    """`dir()` lists it, `help()` says what it is, and of every method what it takes."""
    assert set(dir(qf)) >= {*qf.__all__, "backends", "testing", "trackers"}
    for name in qf.__all__:
        value = getattr(qf, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        assert inspect.getdoc(value), name
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            if not method.startswith("_") and callable(function):
                assert inspect.getdoc(function), f"{name}.{method}"
                assert "*args" not in str(inspect.signature(function)), f"{name}.{method}"


@pytest.fixture(scope="module")
def plan():
    """One that is never trained."""
    return qf.Recipe(qf.ModelSpec("qwen3.5-0.8b")).compile(qf.Machine.named("RTX4090"), strict=False)


@pytest.mark.parametrize("name", TrainingPlan.RENAMED)
def test_arguments_of_other_trainers_are_answered(plan, name):
    """`progress` of earlier versions, `report_to` of others: the message has the line to write."""
    method = "launch" if name == "nproc_per_node" else "train"
    wanted = TrainingPlan.RENAMED[name]
    with pytest.raises(qf.SpecError) as caught:
        getattr(plan, method)("runs/first", **{name: True})
    assert str(caught.value) == (
        f"plan.{method} has no argument {name!r}: it is written {wanted}\n  Fix: plan.{method}({wanted})"
    )


def test_a_misspelt_argument_is_answered(plan):
    """With the nearest that there is."""
    with pytest.raises(qf.SpecError, match=r"plan\.train has no argument 'verbos'; did you mean 'verbose'"):
        plan.train("runs/first", verbos=1)
    assert "verbose: 0 shows notices alone" in inspect.getdoc(plan.train)
    assert "verbose" in inspect.signature(plan.train).parameters
