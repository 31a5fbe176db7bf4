"""Plots of a run, with matplotlib."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from matplotlib.figure import Figure


class NotebookFigure(Figure):  # type: ignore[misc] # matplotlib has no types here
    """A figure that belongs to no window, and that a notebook shows whether or not it has set pyplot up."""

    def _repr_png_(self) -> bytes:
        content = BytesIO()
        self.savefig(content, format="png")
        return content.getvalue()


def plot_lengths(lengths: Any, supervised: Any, max_length: int) -> Any:
    """How many documents are how long, and how many of their tokens are trained.

    Returns:
        A matplotlib figure.
    """
    figure = NotebookFigure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(lengths, bins=40)
    if len(lengths) and max(lengths) > max_length:
        left.axvline(max_length, color="tab:red", lw=1, label="max_length")
        left.legend(frameon=False)
    left.set(xlabel="tokens of a document", ylabel="documents")
    right.hist(supervised / lengths if len(lengths) else [], bins=40, range=(0, 1), color="tab:green")
    right.set(xlabel="share of them that is trained", ylabel="documents")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def plot_loss(history: list[dict[str, Any]]) -> Any:
    """Training loss of every step, and held-out loss where it was measured.

    Returns:
        A matplotlib figure.
    """
    figure = NotebookFigure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = [record for record in history if "loss" in record]
    held_out = [record for record in history if "held_out_loss" in record]
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], lw=1, label="training")
    axes.plot([r["step"] for r in held_out], [r["held_out_loss"] for r in held_out], "o-", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
