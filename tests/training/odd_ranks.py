"""What goes wrong in several processes: ``torchrun odd_ranks.py FOLDER`` writes what each of them raised."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import qwenft as qf
from qwenft.training import ranks

RANK = int(os.environ["RANK"])


def raised(function):
    """The error of a function, and how long it took."""
    started = time.monotonic()
    try:
        function()
    except qf.QwenftError as error:
        return {"kind": type(error).__name__, "text": str(error), "seconds": time.monotonic() - started}
    return None


def other_versions():
    """Join with an older torch in the last process."""
    original = ranks.versions
    if RANK == 1:
        ranks.versions = lambda: {**original(), "torch": "2.12.0"}
    try:
        ranks.Ranks.join(device="cpu")
    finally:
        ranks.versions = original


def main(folder):
    """Try each of them."""
    recipe = qf.Recipe.load(folder / "recipe.json")
    hidden = qf.DataSpec.messages(str(folder / f"seen-by-{RANK}.jsonl")).with_max_length(128)
    others = ranks.Ranks.join(device="cpu")
    few = qf.DataSpec.messages(str(folder / "few.jsonl")).with_max_length(128)
    found = {
        "versions": raised(other_versions),
        "hidden file": raised(lambda: others.together(recipe.with_data(hidden).compile)),
        "few documents": raised(lambda: recipe.with_data(few).compile().train(folder / "few")),
        "other data": raised(lambda: recipe.with_training(seed=RANK).compile().train(folder / "other", verbose=0)),
    }
    (folder / f"raised.{RANK}.json").write_text(json.dumps(found))
    others.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
