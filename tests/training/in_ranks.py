"""What tests run in several processes: ``torchrun in_ranks.py FOLDER``, which holds ``NAME.recipe.json`` files.

Each is trained by all of them; ``NAME.RANK.safetensors`` gets each one's parts of the first gradients and of the
last weights, and ``NAME.RANK.json`` the losses and what it held.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import qwenft as qf


def trained(recipe, *, rows=None):
    """The tensors and numbers of a recipe trained to its end; or of so many rows a step, where each would be one."""
    prepared = recipe.compile().prepare()
    found, gradients = {"experts": [], "losses": [], "norms": [], "micro_batches": [], "tokens": []}, {}

    def keep(*_):
        for name, part in prepared.trained.items():
            if prepared.steps_done == 0 and part.grad is not None and part.numel():
                gradients[f"gradient {name}"] = part.grad.clone()

    prepared.optimizer.register_step_pre_hook(keep)
    for batches in [batches for _, batches in prepared.remaining()] if rows is None else together(prepared, rows):
        result = prepared.step(batches)
        counts = prepared.expert_counts
        found["experts"].append([] if counts is None else counts.tolist())
        found["losses"].append(result.loss)
        found["norms"].append(result.grad_norm)
        found["tokens"].append(result.tokens)
        found["micro_batches"].append([batch.layout.total for batch in batches])
    found["state_bytes"] = prepared.state_bytes
    weights = {f"weight {name}": part.detach() for name, part in prepared.trained.items() if part.numel()}
    return {**gradients, **weights}, found


def together(prepared, rows):
    """The micro-batches of steps of so many rows, as many steps as the recipe has."""
    epochs = (list(itertools.chain.from_iterable(prepared.batches(epoch))) for epoch in itertools.count())
    steps = (epoch[first : first + rows] for epoch in epochs for first in range(0, len(epoch), rows))
    return itertools.islice(steps, prepared.corpus.report.steps)


def main(folder):
    torch.set_num_threads(1)
    for file in sorted(folder.glob("*.recipe.json")):
        tensors, found = trained(qf.Recipe.load(file))
        place = str(folder / file.name.removesuffix(".recipe.json"))
        rank = torch.distributed.get_rank()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{place}.{rank}.safetensors")
        Path(f"{place}.{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
