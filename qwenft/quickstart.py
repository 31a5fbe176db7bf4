"""From nothing to a model that learned something new, on a laptop: ``python -m qwenft.quickstart``.

The tiny base that ships with the package adds, extracts, calls tools and more (``qwenft/testing/skills.py``). A
LoRA teaches it to write orders as tickets, from a few hundred examples among tasks that it knows; what it answers
of tasks that nobody trained on is counted without the adapter and with it. ``--data`` and ``--model`` take your
own.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import qwenft as qf
from qwenft.data.formats import conversation
from qwenft.data.sources import read_rows
from qwenft.testing import tiny_base
from qwenft.testing.skills import SKILLS, examination, mixed_tasks, question_of, tasks, ticket

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qwenft.testing.skills import Row

QUESTIONS = ("Hi, how are you?", "What did you do today?", "Do you like music?")
NEW, KNOWN = 200, 360  # examples of the new behaviour, and of what the base knows
EXAMINED_NEW, EXAMINED_KNOWN = 200, 50  # held-out tasks, of each skill


def behaviour(seed: int) -> list[Row]:
    """Examples of something new, and some of what the base knows, so that it stays."""
    return [*itertools.islice(tasks(ticket, seed), NEW), *itertools.islice(mixed_tasks(seed), KNOWN)]


def read_messages(path: Path) -> list[Row]:
    """The conversations of a JSONL file of your own, checked."""
    data = qf.DataSpec.messages(path)
    return [{"messages": [dict(m) for m in conversation(row, data).messages]} for row in read_rows(data)]


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """Write conversations as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def free_folder(wanted: Path) -> Path:
    """``wanted``, or the first of ``wanted-2``, ``wanted-3`` ... that nothing is in: an earlier run is kept."""
    number, path = 1, wanted
    while path.exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return path


def train(title: str, recipe: qf.Recipe, folder: Path) -> qf.Run:
    """Compile, show the plan, and train."""
    print(f"\n{title}\n{'=' * len(title)}")
    plan = recipe.compile()
    _ = plan.data
    print(plan.explain(), flush=True)
    run = plan.train(folder)
    (_, before), (_, after) = run.held_out_losses[0], run.held_out_losses[-1]
    print(f"held-out loss {before:.3f} before, {after:.3f} after")
    return run


def exact_matches(run: qf.Run) -> dict[str, tuple[float, float]]:
    """The share of held-out tasks of each skill that is answered exactly, without the adapter and with it."""
    tests = {"ticket": examination(ticket, EXAMINED_NEW)}
    tests |= {name: examination(skill, EXAMINED_KNOWN) for name, skill in SKILLS.items()}

    def share(rows: list[Row], *, base: bool) -> float:
        return run.evaluate(qf.DataSpec.messages(rows).pack(), base=base)["exact_match"]

    return {name: (share(rows, base=True), share(rows, base=False)) for name, rows in tests.items()}


def show_exact_matches(found: dict[str, tuple[float, float]]) -> None:
    """Print them, and the mean over what the base knew."""
    print(f"\nAnswered exactly, of held-out tasks\n  {'':16}{'base':>8}{'adapter':>10}")
    known = [shares for name, shares in found.items() if name != "ticket"]
    before, after = (sum(side) / len(known) for side in zip(*known, strict=True))
    named = {"ticket, new": found["ticket"], **{name: found[name] for name in SKILLS}}
    for name, (base, adapter) in {**named, "all but ticket": (before, after)}.items():
        print(f"  {name:16}{base:8.1%}{adapter:10.1%}")


def main(arguments: list[str] | None = None) -> None:
    """Run the quickstart."""
    options = _parse(arguments)
    folder = free_folder(Path(options.run_dir))
    own = options.data is not None
    rows = read_messages(Path(options.data)) if own else behaviour(options.seed)
    path = write_rows(folder / "data.jsonl", rows)
    length, step = (2048, 2048) if own else (512, 1024)  # tokens
    tiny = options.model is None
    recipe = qf.Recipe(
        qf.ModelSpec(tiny_base(), dtype="float32") if tiny else qf.ModelSpec(options.model),
        qf.DataSpec.messages(path).with_max_length(length).pack().hold_out(0.05),
        qf.AdapterSpec.lora(rank=16, alpha=32),
        training=qf.TrainingSpec(
            max_steps=options.steps,
            tokens_per_step=step,
            learning_rate=2e-3 if tiny else 2e-4,
            activation_checkpointing=not tiny,
            seed=options.seed,
        ),
    )
    run = train("A LoRA on your conversations" if own else "A LoRA that writes tickets", recipe, folder / "run")
    if not own:
        found = exact_matches(run)
        show_exact_matches(found)
        (folder / "exact_match.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print("\nAnswers")
    questions = QUESTIONS if own else [question_of(row) for row in examination(ticket, 3)]
    print(run.side_by_side(questions, max_new_tokens=40))
    print(f"\nEverything lies in {folder}; the adapter, for stock peft, in {run.adapter_path}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m qwenft.quickstart", description=__doc__)
    parser.add_argument("--data", help="a JSONL file of conversations instead of the tickets")
    parser.add_argument("--model", help="a checkpoint folder or hub id instead of the tiny base")
    parser.add_argument("--run-dir", default="runs/quickstart", help="where everything is left")
    parser.add_argument("--steps", type=int, default=80, help="how many are trained")
    parser.add_argument("--seed", type=int, default=0, help="of the examples and of training")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
