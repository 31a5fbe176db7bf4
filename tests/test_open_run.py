"""A run by its folder, when it has ended and while it goes on."""

from __future__ import annotations

import json
import shutil
import signal

import pytest

import qwenft as qf

from .training.helpers import recipe

LORA = qf.AdapterSpec.lora(rank=4)


@pytest.fixture(scope="module")
def run(dense_checkpoint, tmp_path_factory):
    """A short run with held-out data."""
    plan = recipe(dense_checkpoint, adapter=LORA, max_steps=3, held_out=0.2, keep_best=True).compile()
    return plan.train(tmp_path_factory.mktemp("opened") / "run", verbose=0)


def test_a_finished_run_is_opened(run):
    """Its records, recipe, environment, results and model are there as the run had them."""
    opened = qf.open_run(run.folder)
    assert opened.history == run.history
    assert opened.ending == "finished"
    assert opened.recipe == run.plan.recipe
    assert opened.steps == 3
    assert opened.best_step == run.best_step
    assert opened.adapter_path == run.adapter_path
    assert opened.checkpoint == run.checkpoint
    assert opened.environment["versions"]["qwenft"] == qf.__version__
    assert opened.notices == []
    assert repr(opened) == repr(run)
    question = "What follows one and two?"
    assert opened.generate(question, max_new_tokens=5) == run.generate(question, max_new_tokens=5)
    assert opened.evaluate() == run.evaluate()


def test_a_run_is_opened_while_it_goes_on(dense_checkpoint, tmp_path):
    """What is written is seen, nothing is disturbed, and whether it goes on is known."""
    seen = []

    def look(record):
        opened = qf.open_run(tmp_path / "run")
        seen.append((record["step"], len(opened.history), opened.ending))
        assert f"running at step {record['step']} of 4" in repr(opened)

    plan = recipe(dense_checkpoint, adapter=LORA, max_steps=4).compile()
    plan.train(tmp_path / "run", verbose=0, on_step=look)
    assert seen == [(step, step, "running") for step in (1, 2, 3, 4)]


def test_an_interrupted_run_says_so(dense_checkpoint, tmp_path):
    """Whatever ended it before its result was there, it is interrupted, and its checkpoint can be asked."""
    plan = recipe(dense_checkpoint, adapter=LORA, max_steps=4).compile()
    plan.train(tmp_path / "run", verbose=0, on_step=lambda _: signal.raise_signal(signal.SIGTERM))
    opened = qf.open_run(tmp_path / "run")
    assert opened.ending == "interrupted"
    assert "interrupted at step 1 of 4" in repr(opened)
    assert opened.generate("What follows one and two?", max_new_tokens=2) is not None


def test_a_record_is_read_without_what_it_was_made_of(run, tmp_path):
    """Where base and data are gone the history and the plot are still there."""
    folder = tmp_path / "copy"
    shutil.copytree(run.folder, folder)
    saved = json.loads((folder / "recipe.json").read_text())
    saved["model"]["source"] = "/gone"
    (folder / "recipe.json").write_text(json.dumps(saved))
    opened = qf.open_run(folder)
    assert opened.history == run.history
    assert opened.plot() is not None
    assert "run of 3 steps" in repr(opened)
    with pytest.raises(qf.QwenftError):
        opened.plan  # noqa: B018


def test_what_is_no_run_is_told(tmp_path):
    """A folder of something else, or none, is named with what to do."""
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(qf.CheckpointError, match=r"is no folder of a run: it holds no plan\.json") as caught:
            qf.open_run(path)
        assert "plan.train(" in caught.value.fix
