"""Which of several processes the others wait for."""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from torch.distributed import DistError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qwenft.training.ranks import Ranks

#: Seconds between two signs of life, and without a step until the user is told.
BEAT, PATIENCE = 2.0, 60.0


class Pulse:
    """While it is entered, every process tells the others where it is, and the first says who holds them up.

    A process is stopped, or its machine is gone, where its signs of life end; it stalls where it stays at one
    place of its own code while others are in a collective. A collective that the device alone waits in cannot be
    seen.

    Args:
        ranks: the processes; of one alone nothing is watched.
        notice: called with a sentence for the user, in the first process.

    Attributes:
        step: the step that this process is at, which the loop sets.
    """

    def __init__(self, ranks: Ranks, notice: Callable[[str], None]) -> None:
        self.step = 0
        self._ranks = ranks
        self._notice = notice
        self._over = threading.Event()
        self._trains = threading.get_ident()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._seen: dict[int, dict[str, Any]] = {}
        self._heard = dict.fromkeys(range(ranks.count), time.monotonic())
        self._moved = dict(self._heard)

    def __enter__(self) -> Self:
        if self._ranks.store is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def suspects(self) -> dict[int, str]:
        """The processes that the others wait for, and why that is believed; none where nothing is watched."""
        if self._ranks.store is None:
            return {}
        now = time.monotonic()
        silent = {
            rank: f"has given no sign of life for {now - since:.0f} s: it is stopped, or its machine is gone"
            for rank, since in self._heard.items()
            if now - since > 4 * BEAT
        }
        least = min((seen["step"] for seen in self._seen.values()), default=0)
        busy = {
            rank: f"is in step {seen['step']}, at {seen['at']}"
            for rank, seen in self._seen.items()
            if seen["step"] == least and not seen["waits"] and now - self._moved[rank] > PATIENCE / 2
        }
        return silent or (busy if len(busy) < self._ranks.count else {})

    def _beat(self) -> None:
        # One of its own: the training thread may wait in the other.
        store = self._ranks.store.clone()
        is_told, step, since, number = False, self.step, time.monotonic(), 0
        while not self._over.wait(BEAT):
            number += 1
            with suppress(RuntimeError):  # the machine that keeps the store is gone
                self._exchange(store, number)
            if self.step != step:
                is_told, step, since = False, self.step, time.monotonic()
            waited = time.monotonic() - since
            if waited > PATIENCE and not is_told and self._ranks.is_first and (found := self.suspects()):
                is_told = True
                self._notice(f"step {step} has taken {waited:.0f} s so far: {suspects_text(found)}")

    def _exchange(self, store: Any, number: int) -> None:
        """Tell where this process is, and take what the others told."""
        at, waits = self._where()
        mine = {"number": number, "step": self.step, "at": at, "waits": waits}
        store.set(f"pulse-{self._ranks.rank}", json.dumps(mine))
        for rank in range(self._ranks.count):
            if store.check([f"pulse-{rank}"]):
                seen = json.loads(store.get(f"pulse-{rank}"))
                before = self._seen.get(rank, {})
                if seen != before:
                    self._heard[rank] = time.monotonic()
                if {**seen, "number": 0} != {**before, "number": 0}:
                    self._moved[rank] = time.monotonic()
                self._seen[rank] = seen

    def _where(self) -> tuple[str, bool]:
        """Where the training thread is, and whether that is a collective."""
        frame = sys._current_frames().get(self._trains)  # noqa: SLF001 - the only way to see another thread
        waits = False
        while frame is not None and "/torch/" in frame.f_code.co_filename:
            waits = waits or "/torch/distributed/" in frame.f_code.co_filename
            frame = frame.f_back
        if frame is None:
            return "its end", waits
        return f"{frame.f_code.co_qualname} ({'/'.join(frame.f_code.co_filename.split('/')[-2:])})", waits


def is_of_collective(error: Exception) -> bool:
    """Whether an error is that of a collective which others have left, or never came to."""
    return isinstance(error, DistError) or "/gloo/" in str(error)


def suspects_text(suspects: dict[int, str]) -> str:
    """What is believed of some processes, for a message."""
    return "; ".join(f"rank {rank} {reason}" for rank, reason in suspects.items())
