"""The loop over steps, on ``Prepared`` and nothing else."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import attrs
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from qwenft.data.stream import Batch
    from qwenft.training.engine import Prepared


def train(
    prepared: Prepared,
    metrics: Path,
    *,
    state_bytes: int,
    on_step: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Train to the end of the recipe, and write a line of metrics a step.

    Args:
        prepared: model, optimizer and data.
        metrics: the file that is appended to; each line is whole.
        state_bytes: of weights, gradients and optimizer, repeated in every record.
        on_step: called with every record, the one before training (step 0) included.

    Returns:
        The records: `step, epoch, loss, learning_rate, grad_norm, tokens, stream_tokens, ranks, seconds,
        tokens_per_second, peak_bytes, state_bytes`, and `held_out_loss` where it was measured.
    """
    history: list[dict[str, Any]] = []

    def record(values: dict[str, Any]) -> None:
        history.append(values)
        with metrics.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(values) + "\n")
        on_step(values)

    if prepared.corpus.held_out is not None:
        record({"step": 0, "held_out_loss": prepared.evaluate(prepared.corpus.held_out)})
    for epoch, batches in _steps(prepared):
        started = time.perf_counter()
        result = prepared.step(batches)
        seconds = time.perf_counter() - started
        values = {
            **attrs.asdict(result),
            "epoch": epoch,
            "ranks": 1,
            "seconds": seconds,
            "tokens_per_second": result.stream_tokens / seconds,
            "peak_bytes": peak_bytes(prepared.device),
            "state_bytes": state_bytes,
        }
        if _is_evaluated(prepared, result.step):
            values["held_out_loss"] = prepared.evaluate(prepared.corpus.held_out)  # type: ignore[arg-type]
        record(values)
    return history


def peak_bytes(device: str) -> int:
    """The most memory so far: of the GPU's tensors, or of the process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _steps(prepared: Prepared) -> Iterator[tuple[int, list[Batch]]]:
    """Epoch and micro-batches of every step that is left."""
    left = prepared.corpus.report.steps
    epoch = 0
    while left:
        for batches in prepared.batches(epoch):
            yield epoch, batches
            left -= 1
            if not left:
                return
        epoch += 1


def _is_evaluated(prepared: Prepared, step: int) -> bool:
    if prepared.corpus.held_out is None:
        return False
    every = prepared.training.evaluate_every
    return step == prepared.corpus.report.steps or (every is not None and step % every == 0)
