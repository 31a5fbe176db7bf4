"""What a plan counted, as plain values for reports and files."""

from __future__ import annotations

import attrs


@attrs.frozen
class DataReport:
    """The data as it will be trained on.

    Args:
        rows: read from the source.
        documents: trained on.
        tokens: of these documents.
        supervised: tokens that the loss is taken on.
        longest: the longest document, in tokens.
        dropped: rows longer than max_length, left out.
        truncated: rows cut at max_length.
        untrained: rows in which no token is trained, left out.
        stream_rows: micro-batches of an epoch.
        fill: tokens over the capacity of these rows, 0 to 1.
        steps_per_epoch: optimizer steps of an epoch.
        steps: optimizer steps of the run.
        held_out: documents kept for evaluation.
        held_out_supervised: tokens that the held-out loss is taken on.
    """

    rows: int
    documents: int
    tokens: int
    supervised: int
    longest: int
    dropped: int
    truncated: int
    untrained: int
    stream_rows: int
    fill: float
    steps_per_epoch: int
    steps: int
    held_out: int
    held_out_supervised: int


@attrs.frozen
class StateBytes:
    """The bytes of what a run holds from its first step to its last, activations apart.

    Args:
        weights: frozen weights in their stored dtype.
        trained: trained parameters, float32.
        gradients: of the trained parameters, float32.
        optimizer: two moments of each trained parameter, float32.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.weights + self.trained + self.gradients + self.optimizer
