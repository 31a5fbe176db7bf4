"""Progress of a run as it goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from tqdm.auto import tqdm

from qwenft.reports.text import bytes_text

if TYPE_CHECKING:
    from types import TracebackType


class Progress:
    """A bar with loss, held-out loss, tokens per second, memory and the time left.

    Args:
        steps: of the run.
        shown: False keeps it quiet.
    """

    def __init__(self, steps: int, *, shown: bool = True) -> None:
        self.bar = tqdm(total=steps, unit="step", disable=not shown, dynamic_ncols=True)
        self.held_out: float | None = None

    def update(self, record: dict[str, Any]) -> None:
        """Show one record of metrics."""
        self.held_out = record.get("held_out_loss", self.held_out)
        shown = {} if self.held_out is None else {"held out": f"{self.held_out:.3f}"}
        if "loss" in record:
            shown = {
                "loss": f"{record['loss']:.3f}",
                **shown,
                "tok/s": f"{record['tokens_per_second']:,.0f}",
                "mem": bytes_text(record["peak_bytes"]),
            }
            self.bar.update()
        self.bar.set_postfix(shown)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
