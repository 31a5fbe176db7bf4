"""What a plan counted, as plain values for reports and files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from qwenft.family.inventory import Weight, inventory
from qwenft.plan.coverage import trained_weights

if TYPE_CHECKING:
    from qwenft.family.architectures import Architecture
    from qwenft.specs.adapter import AdapterSpec


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


_FLOAT32 = 4
_ITEM_BYTES = {"bfloat16": 2, "float32": 4}
# A_log, dt_bias and the GDN norm are float32 in every checkpoint and stay so.
_ISLANDS = ("A_log", "dt_bias")


def state_bytes(architecture: Architecture, adapter: AdapterSpec, dtype: str) -> StateBytes:
    """Count what a run holds: frozen weights as stored, and four float32 values a trained parameter with AdamW."""
    trained = trained_weights(architecture, adapter)
    replaced = {entry.weight for entry in trained if entry.rank is None}
    parameters = sum(entry.parameters for entry in trained)
    weights = sum(
        weight.count * (_FLOAT32 if _is_island(weight) else _ITEM_BYTES[dtype])
        for weight in inventory(architecture)
        if weight not in replaced
    )
    one = parameters * _FLOAT32
    return StateBytes(weights=weights, trained=one, gradients=one, optimizer=2 * one)


def _is_island(weight: Weight) -> bool:
    return weight.parameter in _ISLANDS or weight.module == "linear_attn.norm"
