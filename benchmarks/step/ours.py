"""One measurement of qwenft, in a process of its own."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from job import data
from measuring import RANK, adapter_gradients, arguments, documents_of, measured_pass
from safetensors.torch import save_file

import qwenft as qf
from qwenft.data.stream import Batch
from qwenft.kernels import gated_delta_rule
from qwenft.models import loss

if TYPE_CHECKING:
    import argparse

    import torch

    from qwenft.training.engine import Prepared


def prepared(asked: argparse.Namespace) -> Prepared:
    """The job's recipe, ready."""
    recipe = qf.Recipe(
        qf.ModelSpec(asked.job / "model", dtype="float32"),
        # No micro-batch is larger than the largest of the other side.
        data(asked.job, max(len(row["input_ids"]) for row in documents_of(asked.job))),
        qf.AdapterSpec.lora(rank=RANK, alpha=RANK).on(
            "full_attention", "linear_attention", "linear_attention_gates", "mlp"
        ),
        training=qf.TrainingSpec(epochs=1, activation_checkpointing=asked.checkpointing),
    )
    return recipe.compile().prepare()


def mean_loss(ready: Prepared, document: Any) -> torch.Tensor:
    """Of a document alone."""
    batch = Batch.from_documents([document])
    return ready.loss(batch).total / batch.tokens


def main() -> None:
    """Measure what was asked."""
    asked = arguments(__doc__)
    ready = prepared(asked)

    if asked.measure == "counts":
        # A processor's cache is fed in blocks; counted is what a GPU would launch.
        gated_delta_rule.GROUP_ROWS = loss.CACHED_BYTES = sys.maxsize
    if asked.measure == "documents":
        documents = ready.corpus.train.documents
        found = adapter_gradients(ready.model, documents, lambda document: mean_loss(ready, document))
        save_file(found, asked.out)
        return

    def run() -> None:
        for _, batches in ready.remaining():
            ready.step(batches)

    report: Any = ready.corpus.report
    result = measured_pass(asked, ready.model, run, tokens=report.tokens, supervised=report.supervised)
    asked.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
