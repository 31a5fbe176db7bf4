from __future__ import annotations

import attrs
import pytest

import qwenft as qf
from qwenft.machine import Machine

MESSAGES = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c d"}]}]


def recipe(checkpoint, *, length=256, **training):
    """A LoRA on rows of some tokens."""
    data = qf.DataSpec.messages(MESSAGES * 8).with_max_length(length).pack()
    model = qf.ModelSpec(checkpoint, dtype="float32")
    return qf.Recipe(model, data, qf.AdapterSpec.lora(rank=4), training=qf.TrainingSpec(**training))


@pytest.fixture(scope="module")
def needed(dense_checkpoint):
    """What a step needs, by how often layers are checkpointed."""
    plans = {every: recipe(dense_checkpoint, activation_checkpointing=every).compile() for every in (0, 2, 1)}
    found = {every: plan.memory.needed_bytes for every, plan in plans.items()}
    assert found[0] > found[2] > found[1]
    return found


def computer(memory):
    """This one, with other memory."""
    return attrs.evolve(Machine.detect(), name="a computer", host_bytes=memory)


def test_a_plan_that_does_not_fit_says_what_would_help(dense_checkpoint, needed):
    """It is blocked, with each lever that saves, how much that is, and whether it is enough."""
    asked = recipe(dense_checkpoint, length=512, activation_checkpointing=False)
    plan = asked.compile(computer(needed[0]))
    assert not any(finding.place == "memory" for finding in plan.findings)  # not yet known
    assert not plan.fits
    (finding,) = [finding for finding in plan.findings if finding.place == "memory"]
    assert finding.level == "blocked"
    assert finding.problem.startswith("a step needs ")
    lines = finding.fix.splitlines()
    assert "with_training(activation_checkpointing=1) saves" in lines[1]
    assert "which is enough" in next(line for line in lines if "with_data(max_length=256)" in line)


def test_a_plan_that_fits_has_no_such_finding(dense_checkpoint, needed):
    """What is exactly enough fits."""
    plan = recipe(dense_checkpoint).compile(computer(needed[1]))
    assert plan.fits
    assert not any(finding.place == "memory" for finding in plan.findings)
    assert not recipe(dense_checkpoint).compile(computer(needed[1] - 1)).fits


@pytest.mark.long
def test_fit_changes_what_is_exact_before_what_is_not(dense_checkpoint, needed):
    """Where checkpointing is enough it is taken, the fastest kind of it, and the notes say so with its bytes."""
    asked = recipe(dense_checkpoint, activation_checkpointing=False)
    half = asked.fit(computer((needed[0] + needed[2]) // 2))
    assert half == asked.with_training(activation_checkpointing=2)
    assert any("activation_checkpointing=2) saves" in note for note in half.notes)
    assert asked.fit(computer(needed[1])) == asked.with_training(activation_checkpointing=1)


@pytest.mark.long
def test_fit_gives_up_memory_that_is_there_for_time(dense_checkpoint, needed):
    """Where everything can be kept, nothing is computed twice; and what fits as it is, and is fast, stays."""
    kept = recipe(dense_checkpoint).fit(computer(needed[0]))
    assert kept == recipe(dense_checkpoint, activation_checkpointing=0)
    assert any("takes" in note for note in kept.notes)
    again = kept.fit(computer(needed[0]))
    assert again == kept
    assert again.notes[-1].startswith("fits a computer as it is")


@pytest.mark.long
def test_what_cannot_fit_is_refused_by_how_much(dense_checkpoint):
    """No lever helps a machine that has not the memory of Python itself."""
    asked = recipe(dense_checkpoint)
    with pytest.raises(qf.PlanError, match=r"a computer has 97.7 KiB a process; with all .* too large"):
        asked.fit(computer(100_000))


def test_a_run_that_does_not_fit_is_not_begun(dense_checkpoint, needed, tmp_path, monkeypatch):
    """Training asks for the memory itself, before a weight is read."""
    small = computer(needed[1] // 2)
    monkeypatch.setattr(Machine, "detect", lambda: small)
    plan = recipe(dense_checkpoint).compile()
    with pytest.raises(qf.PlanError, match=r"before this can run[\s\S]*a step needs"):
        plan.train(tmp_path / "run", verbose=0)
    assert not (tmp_path / "run").exists()
