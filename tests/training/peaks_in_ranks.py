"""What processes hold at most: ``torchrun peaks_in_ranks.py FOLDER``, which holds ``NAME.recipe.json`` files.

``NAME.RANK.json`` gets the peak of one step in each process, and the documents of its micro-batch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import qwenft as qf
from qwenft.testing import measured_peak


def measured(recipe):
    """Of the first step of a recipe."""
    prepared = recipe.compile().prepare()
    step = next(prepared.batches())
    (batch, *others) = step
    return {
        "peak": measured_peak(prepared, step),
        "lengths": batch.layout.lengths,
        "supervised": int(batch.tokens),
        "accumulates": bool(others),
    }


def main(folder):
    torch.set_num_threads(1)
    for file in sorted(folder.glob("*.recipe.json")):
        found = measured(qf.Recipe.load(file))
        name = file.name.removesuffix(".recipe.json")
        (folder / f"{name}.{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
