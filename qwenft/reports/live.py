"""Progress of a run as it goes."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Self

from tqdm.auto import tqdm

from qwenft.display import bytes_text, time_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from qwenft.plan.records import DataReport
    from qwenft.specs.training import TrainingSpec


class Progress:
    """A line with the time left, loss, held-out loss, tokens per second and memory.

    Args:
        data: the steps and tokens of the run.
        training: when it is evaluated.
        steps_done: by the run before, where it continues.
        shown: False keeps it quiet.
        clock: seconds.
    """

    def __init__(
        self,
        data: DataReport,
        training: TrainingSpec,
        steps_done: int = 0,
        *,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bar = tqdm(
            total=data.steps,
            initial=steps_done,
            disable=not shown,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]",
        )
        self.time_left = TimeLeft(data, training, clock)
        self.held_out: float | None = None

    def step(self, record: dict[str, Any]) -> None:
        """Show the record of a step."""
        held_out = {} if self.held_out is None else {"held out": f"{self.held_out:.3f}"}
        left = self.time_left.after(record)
        self.bar.update(record["step"] - self.bar.n)  # steps that were left out have told nothing
        self.bar.set_postfix(
            {
                "left": time_text(left),
                "loss": f"{record['loss']:.3f}",
                **held_out,
                "tok/s": f"{record['tokens_per_second']:,.0f}",
                "mem": bytes_text(record["peak_bytes"]),
            }
        )

    def evaluation(self, record: dict[str, Any]) -> None:
        """Take the record of an evaluation, before that of its step."""
        self.held_out = record.get("held_out_loss", self.held_out)
        self.time_left.evaluated(record)

    def notice(self, sentence: str) -> None:
        """Say something above the line, be it shown or not."""
        self.bar.write(sentence, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


class TimeLeft:
    """How long the rest of a run takes: its tokens at the rate so far, and its evaluations as long as the last.

    Steps differ in tokens and evaluations are rare and long, so that steps alone would say little.

    Args:
        data: the steps and tokens of the run.
        training: when it is evaluated.
        clock: seconds; it starts now.
    """

    def __init__(self, data: DataReport, training: TrainingSpec, clock: Callable[[], float]) -> None:
        self.data = data
        self.every = training.evaluate_every
        self.clock = clock
        self.started = clock()
        self.tokens = 0
        self.evaluating = self.evaluation = 0.0

    def evaluated(self, record: dict[str, Any]) -> None:
        """Take the time of an evaluation."""
        self.evaluation = record["evaluation_seconds"]
        self.evaluating += self.evaluation

    def after(self, record: dict[str, Any]) -> float:
        """The seconds that are left after a step, saving and all else that a step brings included."""
        self.tokens += record["stream_tokens"]
        seconds_a_token = (self.clock() - self.started - self.evaluating) / self.tokens
        left = self.data.steps - record["step"]
        tokens_left: float = left * self.data.tokens / self.data.steps_per_epoch
        return tokens_left * seconds_a_token + self._evaluations_left(record["step"]) * self.evaluation

    def _evaluations_left(self, step: int) -> int:
        last = self.data.steps
        on_the_way = 0 if self.every is None else (last - 1) // self.every - step // self.every
        return max(0, on_the_way) + (step < last)
