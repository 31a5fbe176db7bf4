"""What a run left: its history, its adapter, and the trained model at hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from qwenft.specs.data import DataSpec
    from qwenft.training.engine import Prepared
    from qwenft.training_plan import TrainingPlan


@attrs.frozen(eq=False, repr=False)
class Run:
    """A finished run.

    Args:
        folder: where it lies.
        plan: what it executed.
        prepared: the trained model, its tokenizer and data.
        history: a record a step, as in ``metrics.jsonl``.
    """

    folder: Path
    plan: TrainingPlan
    prepared: Prepared
    history: list[dict[str, Any]]

    @property
    def adapter_path(self) -> Path | None:
        """The adapter's folder; None after full fine-tuning, which leaves ``model/``."""
        path = self.folder / "adapter"
        return path if path.exists() else None

    @property
    def held_out_losses(self) -> list[tuple[int, float]]:
        """(step, loss) of every evaluation on held-out data."""
        return [(record["step"], record["held_out_loss"]) for record in self.history if "held_out_loss" in record]

    def evaluate(self, data: DataSpec | None = None) -> dict[str, float]:
        """Loss and perplexity on data of your own, or on the held-out part.

        Args:
            data: conversations; the held-out part where None.

        Raises:
            DataError: there is nothing to evaluate on.
        """
        return self.plan.evaluate(self.prepared, data)

    def generate(
        self,
        messages: str | list[dict[str, Any]],
        *,
        max_new_tokens: int = 256,
        base: bool = False,
        **options: Any,
    ) -> str:
        """The model's answer.

        Args:
            messages: a conversation, or the text of one user turn.
            max_new_tokens: at the most.
            base: let the model answer without its adapter.
            **options: of transformers' ``generate``; greedy where none are given.
        """
        from qwenft.models.generate import answer

        return answer(self.prepared.model, self.prepared.tokenizer, messages, max_new_tokens, base=base, **options)

    def export(self, path: str | Path) -> Path:
        """Write the original checkpoint with what was learned merged in, for plain transformers.

        Raises:
            CheckpointError: the place is taken, or cannot be written.
        """
        return self.plan.export(self.prepared.model, Path(path))

    def plot(self) -> Any:
        """The loss over the steps, as a matplotlib figure."""
        from qwenft.reports.plots import plot_loss

        return plot_loss(self.history)

    def __repr__(self) -> str:
        from qwenft.reports.text import render_run

        return render_run(self)
