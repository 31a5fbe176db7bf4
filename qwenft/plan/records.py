"""What a plan counted, as plain values for reports and files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from qwenft.display import Shown
from qwenft.family.inventory import inventory, parted
from qwenft.plan.storage import ITEM_BYTES

if TYPE_CHECKING:
    from qwenft.family.architectures import Architecture
    from qwenft.plan.coverage import TrainedWeight
    from qwenft.plan.storage import Storage
    from qwenft.specs.training import TrainingSpec


@attrs.frozen(repr=False)
class DataReport(Shown):
    """The data as it will be trained on.

    Args:
        rows: read from the source.
        documents: trained on.
        tokens: of these documents.
        supervised: tokens that the loss is taken on.
        longest: the longest document, in tokens.
        dropped: rows longer than max_length, left out.
        truncated: rows cut behind the last message that fits.
        split: rows cut into several documents.
        untrained: rows in which no token is trained, left out.
        lost: (what the chat template leaves out, in how many rows).
        skipped: the errors of rows that are wrong, left out.
        read_tokens: of all rows that were read.
        lost_tokens: of rows that the length policy drops or cuts, and of rows that train nothing.
        lengths: (the longest, how many) of the rows in steps of equal width, before the length policy.
        cache: where the tokens were read from or written to, or why they are in memory alone.
        stream_rows: micro-batches of an epoch.
        fill: tokens over the capacity of these rows, 0 to 1.
        steps_per_epoch: optimizer steps of an epoch.
        steps: optimizer steps of the run.
        held_out: documents kept for evaluation.
        held_out_supervised: tokens that the held-out loss is taken on.
        images: of the documents.
        videos: of the documents.
        vision_tokens: of the tokens, those that are images and videos.
        window: how many rows were counted at the most, where the data are streamed; None where all were.
    """

    rows: int
    documents: int
    tokens: int
    supervised: int
    longest: int
    dropped: int
    truncated: int
    split: int
    untrained: int
    lost: tuple[tuple[str, int], ...]
    skipped: tuple[str, ...]
    read_tokens: int
    lost_tokens: int
    lengths: tuple[tuple[int, int], ...]
    cache: str
    stream_rows: int
    fill: float
    steps_per_epoch: int
    steps: int
    held_out: int
    held_out_supervised: int
    images: int = 0
    videos: int = 0
    vision_tokens: int = 0
    window: int | None = None

    def shown(self) -> list[tuple[str, str]]:
        """What is trained on, and what was left out."""
        left_out = {
            "dropped": self.dropped,
            "truncated": self.truncated,
            "split": self.split,
            "without a trained token": self.untrained,
            "wrong": len(self.skipped),
        }
        return [
            ("documents", f"{self.documents:,} of {self.rows:,} rows, of {self.longest:,} tokens at most"),
            ("tokens", f"{self.tokens:,}, {self.supervised:,} of them trained"),
            *((("images", f"{self.images:,}, videos {self.videos:,}"),) if self.vision_tokens else ()),
            ("rows of the stream", f"{self.stream_rows:,}, filled to {self.fill:.0%}"),
            ("steps", f"{self.steps:,}, of these {self.steps_per_epoch:,} an epoch"),
            *((("held out", f"{self.held_out:,} documents"),) if self.held_out else ()),
            *((name, f"{count:,} rows") for name, count in left_out.items() if count),
            *((f"lost: {what}", f"{count:,} rows") for what, count in self.lost),
            ("kept", self.cache),
        ]


@attrs.frozen
class StateBytes:
    """The bytes of what a run holds from its first step to its last, activations apart.

    Args:
        weights: frozen weights in their stored dtype, where the model computes.
        trained: trained parameters: float32, or bfloat16 where they are rounded stochastically.
        gradients: of the trained parameters: float32, or of their dtype where a step is one micro-batch; of the
            largest one where the optimizer steps in backward.
        optimizer: what the optimizer keeps of each trained parameter.
        on_host: what stays in host memory, and is not in the sum.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    on_host: int = 0

    @property
    def total(self) -> int:
        """What is held where the model computes."""
        return self.weights + self.trained + self.gradients + self.optimizer


_FLOAT32 = 4
# bitsandbytes 0.50, optim/optimizer.py: smaller tensors keep float32 moments; others a byte each, and for either
# moment a float32 maximum a block. Two maps of 1 KiB that all tensors share are not counted.
_SMALL = 4096
_BLOCK = 256


def state_bytes(
    architecture: Architecture,
    entries: tuple[TrainedWeight, ...],
    training: TrainingSpec,
    storage: Storage,
    *,
    shards: int = 1,
    offloaded: bool = False,
) -> StateBytes:
    """Count what a process of a run holds.

    Args:
        architecture: the model as it is loaded.
        entries: what is trained.
        training: the optimizer, and how trained weights and gradients are held.
        storage: how weights are held.
        shards: the processes that each weight is shared out over; one of few rows may be held unevenly.
        offloaded: what is shared out stays in host memory.
    """
    replaced = [entry.weight for entry in entries if entry.how == "itself"]
    trained = gradients = optimizer = on_host = weights = 0
    for entry in entries:
        item = _FLOAT32
        if entry.how == "itself" and not training.master_weights and not entry.weight.is_float32:
            item = ITEM_BYTES[storage.dtype]
        is_whole = entry.how == "itself" and storage.is_whole(entry.weight)
        sizes = [size if is_whole else -(-size // shards) for size in entry.sizes]
        count = entry.weight.instances * sum(sizes)
        moments = entry.weight.instances * sum(_optimizer_bytes(size, training) for size in sizes)
        gradient = (_FLOAT32 if accumulates(training) else item) * count
        if offloaded and not is_whole:
            on_host += item * count + moments + gradient
            continue
        trained += item * count
        if training.optimizer_in_backward:
            gradients = max(gradients, item * max(sizes))
        else:
            gradients += gradient
        optimizer += moments
    for weight in inventory(architecture):
        kept, _ = parted(weight, replaced)
        if kept is None:
            continue
        part, whole = storage.process_bytes(kept, text_only=architecture.is_text_only, shards=shards)
        if offloaded or (weight.role == "embeddings" and training.embeddings_on_host):
            on_host += part
            weights += whole
        else:
            weights += part + whole
    return StateBytes(weights=weights, trained=trained, gradients=gradients, optimizer=optimizer, on_host=on_host)


def accumulates(training: TrainingSpec) -> bool:
    """Whether a step may have several micro-batches, so that gradients are added up, in float32."""
    return training.tokens_per_step is not None


def _optimizer_bytes(size: int, training: TrainingSpec) -> int:
    """What the optimizer keeps of a tensor of so many elements."""
    if training.optimizer == "sgd":
        return _FLOAT32 * size if training.momentum else 0
    if training.optimizer.endswith("8bit") and size >= _SMALL:
        return 2 * (size + _FLOAT32 * -(-size // _BLOCK))
    return 2 * _FLOAT32 * size
