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
