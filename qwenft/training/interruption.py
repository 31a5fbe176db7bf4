"""Ctrl-C, a notebook's interrupt and SIGTERM, as a wish that the loop fulfils after its step."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While it is entered, a first signal is noted, and a second one raises KeyboardInterrupt.

    Signals reach the main thread alone; in another one nothing is changed.

    Args:
        notice: called with a sentence for the user when a first signal comes.

    Attributes:
        signal: the name of the signal that came, or None.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.notice = notice
        self.signal: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        with suppress(RuntimeError):  # where the signal cut into a write to the very stream
            self.notice(f"{self.signal}: ending after this step with a checkpoint; once more ends at once")
