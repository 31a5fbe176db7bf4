"""One measurement of qwenft, in a process of its own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from job import RANK, data
from measuring import arguments, fill_adapters, measured_pass
from safetensors.torch import save_file

import qwenft as qf
from qwenft.data.stream import Batch

if TYPE_CHECKING:
    import argparse

    from qwenft.training.engine import Prepared


def prepared(asked: argparse.Namespace) -> Prepared:
    """The job's recipe, ready."""
    recipe = qf.Recipe(
        qf.ModelSpec(asked.job / "model", dtype="float32"),
        data(asked.job, asked.row_tokens),
        qf.AdapterSpec.lora(rank=RANK, alpha=RANK).on(
            "full_attention", "linear_attention", "linear_attention_gates", "mlp"
        ),
        training=qf.TrainingSpec(epochs=1, activation_checkpointing=asked.checkpointing),
    )
    return recipe.compile().prepare()


def documents(ready: Prepared) -> dict[str, torch.Tensor]:
    """Loss and adapter gradient of each document."""
    adapters = fill_adapters(ready.model)
    found: dict[str, torch.Tensor] = {}
    for index, document in enumerate(ready.corpus.train.documents[:4]):
        batch = Batch.from_documents([document])
        loss = ready.loss(batch).total / batch.tokens
        gradients = torch.autograd.grad(loss, list(adapters.values()))
        found[f"{index}:loss"] = loss.detach()
        found |= {f"{index}:{name}": grad for name, grad in zip(adapters, gradients, strict=True)}
    return found


def main() -> None:
    """Measure what was asked."""
    asked = arguments(__doc__)
    ready = prepared(asked)

    if asked.measure == "documents":
        save_file(documents(ready), asked.out)
        return

    def run() -> None:
        for _, batches in ready.remaining():
            ready.step(batches)

    report: Any = ready.corpus.report
    result = measured_pass(asked, ready.model, run, tokens=report.tokens, supervised=report.supervised)
    asked.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
