"""Losses that fail in one process of several, as the environment says."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

from qwenft.models.loss import supervised_loss
from qwenft.training import stalls

CALLS: list[int] = []


def failing(hidden, batch, head):
    """Raise in the second process."""
    if os.environ.get("RANK") == "1":
        msg = "no more of this"
        raise ZeroDivisionError(msg)
    return supervised_loss(hidden, head, batch.labels, batch.weights)


def poisoned(hidden, batch, head):
    """Infinite for the seventh row, and cross entropy for all others."""
    total = supervised_loss(hidden, head, batch.labels, batch.weights)
    return total * math.inf if ("rows in memory", 7) in batch.documents else total


def stalling(hidden, batch, head):
    """Hold the second process up for a while in its first step, asleep or stopped as the environment says."""
    stalls.BEAT, stalls.PATIENCE = 0.3, 3.0
    if os.environ.get("RANK") == "1" and hidden.requires_grad:
        CALLS.append(1)
        if len(CALLS) == 3 and os.environ["STALLS"] == "asleep":
            time.sleep(9)
        elif len(CALLS) == 3:
            subprocess.Popen(["/bin/sh", "-c", f"sleep 9; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
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
