"""Losses that fail in one process of several, as the environment says."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from qwenft.models.loss import supervised_loss


def failing(hidden, batch, head):
    """Raise in the second process."""
    if os.environ.get("RANK") == "1":
        msg = "no more of this"
        raise ZeroDivisionError(msg)
    return supervised_loss(hidden, head, batch.labels, batch.weights)


def dying(hidden, batch, head):
    """Kill the second process at each of the micro-batches that a file lists, counted over its lives."""
    place = Path(os.environ["DYING"])
    if os.environ.get("RANK") == "1" and hidden.requires_grad:
        left = [number - 1 for number in json.loads(place.read_text())]
        dies = 0 in left
        place.write_text(json.dumps([number for number in left if number]))
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
    return supervised_loss(hidden, head, batch.labels, batch.weights)
