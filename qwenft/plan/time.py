"""How long a step and a run take, as a plan says it."""

from __future__ import annotations

import attrs

from qwenft.display import Shown, bytes_text, time_text


@attrs.frozen(repr=False)
class TimeReport(Shown):
    """An estimate: what is counted in a simulated step, at the rates of the machine (a roofline).

    Every operation takes as long as its matrix products at the machine's highest rate or as moving its arguments
    and results, whichever is longer; what other processes send comes meanwhile. What starts operations, copies to
    the host, reading data, evaluations and checkpoints are not counted: it is the least that a step can take.

    Args:
        step_seconds: of a step.
        update_seconds: of these, for updating the trained parameters.
        tokens: of a step, of all processes.
        operations: floating-point operations of matrix products in a step, in each process.
        moved: bytes that the operations of a step read and write, in each process.
        sent: bytes that each process sends in a step.
        slower: how many times slower than counted a short step was on this machine, by which the times are
            multiplied; None where none was measured.
        steps: of the run, where the data have been counted.
    """

    step_seconds: float
    update_seconds: float
    tokens: int
    operations: float
    moved: float
    sent: float
    slower: float | None = None
    steps: int | None = None

    @property
    def run_seconds(self) -> float | None:
        """Of all steps, evaluations and checkpoints apart; None where the data have not been counted."""
        return None if self.steps is None else self.steps * self.step_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all processes."""
        return self.tokens / self.step_seconds

    def shown(self) -> list[tuple[str, str]]:
        """Of a step, and of the run where its steps are known."""
        known = "" if self.slower is None else f", measured {self.slower:.1f} times slower than counted"
        run = (
            ()
            if self.run_seconds is None
            else (("run", f"{time_text(self.run_seconds)}, of {self.steps:,} steps"),)
        )
        return [
            ("step", f"{self.step_seconds:.3g} s, of these {self.update_seconds:.3g} for the update{known}"),
            *run,
            ("tokens", f"{self.tokens:,} a step, {self.tokens_per_second:,.0f} a second"),
            ("operations", f"{self.operations:.3g} in matrix products"),
            ("moved", bytes_text(self.moved)),
            ("sent", bytes_text(self.sent)),
        ]
