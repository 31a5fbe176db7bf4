from __future__ import annotations

import runpy
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "notebooks.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
HEAVY = ("02", "10")  # of those that take the longest


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.long if path.stem.startswith(HEAVY) else [])
        for path in NOTEBOOKS
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_notebook_says_what_is_printed_in_it(path, tmp_path):
    """Executed from its first cell to its last, each has outputs of the kinds and the words that are kept in it."""
    kept, again = nbformat.read(path, as_version=4), SCRIPT["executed"](path, tmp_path)
    for number, (cell, other) in enumerate(zip(kept.cells, again.cells, strict=True)):
        assert SCRIPT["summary"](other) == SCRIPT["summary"](cell), f"cell {number}"
    outputs = [output for cell in kept.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any("Warning" in output.get("text", "") for output in outputs)
    assert str(Path.home()) not in path.read_text(encoding="utf-8")


WATCHED = """
import qwenft as qf
from qwenft.testing.skills import ticket, examination
recipe = qf.Recipe(
    qf.ModelSpec(qf.testing.tiny_base(), dtype="float32"),
    qf.DataSpec.messages(examination(ticket, 40)).hold_out(0.2),
    qf.AdapterSpec.lora(rank=4),
    training=qf.TrainingSpec(max_steps=12, evaluate_every=6, sample_prompts=("<b>Who?</b>",), sample_tokens=4),
)
run = recipe.compile().train("run")
"""
LESS = 'run = recipe.compile().train("{0}", verbose={0})'


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_cell_that_trains_has_one_output(tmp_path):
    """In a kernel the view is a single output that was drawn anew, HTML with a text twin; nothing else is written."""
    sources = (WATCHED, LESS.format(1), LESS.format(0))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    view, line, nothing = (cell.outputs for cell in notebook.cells)
    assert nothing == []
    for outputs in (view, line):
        (output,) = outputs
        html, text = output["data"]["text/html"], output["data"]["text/plain"]
        assert text.startswith("12/12 steps, ending finished, loss ")
        assert ("<polyline" in html) == (outputs is view)
        assert ("&lt;b&gt;Who?" in html) == (outputs is view)
        assert len(html) < 60_000


LONG_RUN = """
import qwenft as qf
checkpoint = qf.testing.tiny_checkpoint("tiny")
chats = [{"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "Yes."}]} for n in range(9)]
recipe = qf.Recipe(
    qf.ModelSpec(checkpoint, dtype="float32"),
    qf.DataSpec.messages(chats).with_max_length(64),
    training=qf.TrainingSpec(max_steps=100_000),
)
run = recipe.compile().train("run", verbose=0)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_interrupted_cell_returns_a_run(tmp_path):
    """The stop button ends the run after its step: the cell has no error, and the run is there and says how it goes on."""
    manager, client = start_new_kernel(cwd=str(tmp_path))
    try:
        client.execute(LONG_RUN)
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        manager.interrupt_kernel()
        assert client.get_shell_msg(timeout=60)["content"]["status"] == "ok"
        reply = client.execute("", user_expressions={"run": "repr(run)"}, reply=True, timeout=60)
        text = reply["content"]["user_expressions"]["run"]["data"]["text/plain"]
        assert "interrupted at step" in text
        assert "continues from run/checkpoints/step-" in text
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
