"""Curves of a run, however long it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from qwenft.display import Line

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Points = list[tuple[float, float]]


def smoothed(values: Sequence[float]) -> list[float]:
    """The values by :class:`Mean`."""
    mean = Mean(len(values))
    return [mean.after(value) for value in values]


class Mean:
    """An exponential mean of the values so far, in which the first ones weigh no more than others.

    It looks back over about a twentieth of them, and over 20 at the most.

    Args:
        values: how many there are in all.
    """

    def __init__(self, values: int) -> None:
        self.kept = 1 - 1 / min(20.0, max(1.0, values / 20))
        self.total, self.rest = 0.0, 1.0

    def after(self, value: float) -> float:
        """The mean with another value."""
        self.total = self.kept * self.total + (1 - self.kept) * value
        self.rest *= self.kept
        return self.total / (1 - self.rest)


@attrs.define
class Thinned:
    """Points that come one after the other, of which no more are kept than a picture shows.

    Neighbours are averaged, twice as many as before whenever there are too many.

    Args:
        most: how many are kept, an even number.
    """

    most: int = 400
    points: Points = attrs.field(init=False, factory=list)
    _width: int = attrs.field(init=False, default=1)
    _waiting: Points = attrs.field(init=False, factory=list)

    def add(self, x: float, y: float) -> None:
        """Take a point."""
        self._waiting.append((x, y))
        if len(self._waiting) < self._width:
            return
        self.points.append(_mean(self._waiting))
        self._waiting.clear()
        if len(self.points) == self.most:
            self.points = [_mean(pair) for pair in zip(self.points[::2], self.points[1::2], strict=True)]
            self._width *= 2


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    xs, ys = zip(*points, strict=True)
    return sum(xs) / len(xs), sum(ys) / len(ys)


class Curves:
    """The loss of a run, as it is, smoothed and held out, and its learning rate.

    Args:
        steps: of the whole run.
        history: the records so far.
    """

    def __init__(self, steps: int, history: Iterable[dict[str, Any]] = ()) -> None:
        self._mean = Mean(steps)
        self._loss, self._smoothed, self._held_out, self._rate = (Thinned() for _ in range(4))
        for record in history:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        """Take the record of a step, of an evaluation, or of both."""
        step = record["step"]
        if "loss" in record:
            self._loss.add(step, record["loss"])
            self._smoothed.add(step, self._mean.after(record["loss"]))
            self._rate.add(step, record["learning_rate"])
        if "held_out_loss" in record:
            self._held_out.add(step, record["held_out_loss"])

    @property
    def loss(self) -> list[Line]:
        """Of a chart."""
        return [
            Line("loss", self._loss.points, "faint"),
            Line("smoothed", self._smoothed.points),
            Line("held out", self._held_out.points, "dots", colour=1),
        ]

    @property
    def rate(self) -> list[Line]:
        """Of a chart."""
        return [Line("learning rate", self._rate.points, colour=2)]
