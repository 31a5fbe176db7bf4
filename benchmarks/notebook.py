"""What people wait for in a notebook: the first view of a plan, and what the live view takes of a run.

``python benchmarks/notebook.py`` writes ``benchmarks/results/notebook.json``. The view of a plan is timed in fresh
processes, from before ``import qwenft`` to its HTML. The live view runs in a real kernel, on steps of the tiny
base; its share is the time within its functions, of the time of the steps.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

PLANS = ("qwen3.5-0.8b", "qwen3.5-27b", "qwen3.5-397b-a17b")
REPEATS = 5
PLAN = """
import time
started = time.perf_counter()
import qwenft as qf
data = qf.DataSpec.messages("chats.jsonl").pack()
plan = qf.Recipe(qf.ModelSpec({name!r}), data, qf.AdapterSpec.lora()).compile()
plan._repr_html_()
print(time.perf_counter() - started)
"""
RUN = """
import json, time
from itertools import islice
import qwenft as qf
from qwenft.reports.live import Live
from qwenft.testing.skills import tasks, ticket

spent = 0.0

def timed(function):
    def call(*args):
        global spent
        started = time.perf_counter()
        function(*args)
        spent += time.perf_counter() - started
    return call

for name in ("step", "evaluation", "notice"):
    setattr(Live, name, timed(getattr(Live, name)))
recipe = qf.Recipe(
    qf.ModelSpec(qf.testing.tiny_base(), dtype="float32"),
    qf.DataSpec.messages(list(islice(tasks(ticket, 0), 300))).with_max_length(512).pack().hold_out(0.1),
    qf.AdapterSpec.lora(),
    training=qf.TrainingSpec(max_steps=100, tokens_per_step=1024, evaluate_every=25, sample_prompts=("Hi",)),
)
run = recipe.compile().train("run")
seconds = sum(record["seconds"] for record in run.history if "loss" in record)
"""


def first_view(name: str, folder: Path) -> float:
    """Seconds from nothing to the HTML of a plan."""
    command = [sys.executable, "-c", PLAN.format(name=name)]
    return float(subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout)  # noqa: S603 - our own


def share_of_live_view(folder: Path) -> float:
    """Of the time of the steps of a run in a kernel."""
    cells = [nbformat.v4.new_code_cell(RUN), nbformat.v4.new_code_cell("print(json.dumps([spent, seconds]))")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    spent, seconds = json.loads(notebook.cells[1].outputs[0].text)
    return spent / seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def main() -> None:
    """Measure, print and write."""
    found: dict[str, object] = {"date": time.strftime("%Y-%m-%d"), "repeats": REPEATS, "first_view_seconds": {}}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
        (folder / "chats.jsonl").write_text(100 * (json.dumps(row) + "\n"), encoding="utf-8")
        views = {name: spread([first_view(name, folder) for _ in range(REPEATS)]) for name in PLANS}
        found["first_view_seconds"] = views
    shares = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as place:
            shares.append(share_of_live_view(Path(place)))
    found["share_of_live_view"] = spread(shares)
    print(json.dumps(found, indent=2))
    results = Path(__file__).with_name("results") / "notebook.json"
    results.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
