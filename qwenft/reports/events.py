"""TensorBoard's event files, through tensorboardX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from tensorboardX import SummaryWriter

if TYPE_CHECKING:
    from pathlib import Path

_STEP = ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "peak_bytes", "state_bytes")
_EVALUATION = ("held_out_loss", "held_out_perplexity", "held_out_accuracy", "held_out_exact_match")


class EventFile:
    """What TensorBoard shows of a run.

    Args:
        folder: of the event files.
        steps_done: a run that continues takes later steps, of the time before, away.
    """

    def __init__(self, folder: Path, steps_done: int) -> None:
        self.writer = SummaryWriter(
            str(folder),
            purge_step=steps_done + 1 if steps_done else None,
            filename_suffix=f".{steps_done}",  # a run that is continued within a second keeps the file before
        )

    def step(self, record: dict[str, Any]) -> None:
        """Write the numbers of a step."""
        for name in _STEP:
            self.writer.add_scalar(f"train/{name}", record[name], record["step"])

    def evaluation(self, record: dict[str, Any]) -> None:
        """Write the numbers and the answers of an evaluation."""
        for name in _EVALUATION:
            if name in record:
                self.writer.add_scalar(f"held_out/{name.removeprefix('held_out_')}", record[name], record["step"])
        for sample in record["samples"]:
            self.writer.add_text(sample["prompt"], sample["answer"], record["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()
