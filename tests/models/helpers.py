"""What the tests of models share."""

from __future__ import annotations

import torch

from qwenft import backends
from qwenft.data.masking import IGNORED
from qwenft.data.stream import Batch
from qwenft.kernels.layout import SequenceLayout
from qwenft.models.bind import bind, hidden_states
from qwenft.models.checkpoint import architecture_of
from qwenft.models.elementwise import fuse_elementwise
from qwenft.models.load import load_model
from qwenft.models.precision import compute_in
from qwenft.plan.storage import Storage
from qwenft.specs.model import ModelSpec

LENGTHS = (1, 3, 63, 64, 65, 130, 500)


def bound(checkpoint, *, full="sdpa", linear="torch", dtype="float32", compute="float32"):
    """The text half of a checkpoint, bound and in evaluation mode."""
    model = load_model(checkpoint, architecture_of(ModelSpec(checkpoint)).text_only(), storage=Storage(dtype))
    bind(model, full=backends.full(full), linear=backends.linear(linear))
    return compute_in(fuse_elementwise(model), compute).eval()


def documents(lengths=LENGTHS, *, vocabulary=500, seed=0):
    """Random documents."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def next_token_labels(document):
    """Labels that train every token but the first."""
    return [*document[1:], IGNORED]


def batch_of(docs):
    """One row of the stream that trains on every token."""
    return Batch(
        input_ids=torch.tensor([token for document in docs for token in document]),
        labels=torch.tensor([label for document in docs for label in next_token_labels(document)]),
        layout=SequenceLayout.from_lengths([len(document) for document in docs]),
    )


def packed_logits(model, docs):
    """The logits of documents in one row, split again."""
    batch = batch_of(docs)
    logits = model.lm_head(hidden_states(model, batch.input_ids, batch.layout))
    return logits.split([len(document) for document in docs])


def relative(got, wanted):
    """The largest deviation over the largest wanted value."""
    return ((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()
