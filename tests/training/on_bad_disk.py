"""Saves and loads a checkpoint on a disk whose every operation fails once; run with disk.c before libc."""

from __future__ import annotations

import ctypes
import errno
import json
import shutil
import sys
from pathlib import Path

import torch

import qwenft as qf
from qwenft.training.checkpoint import read_manifest

FAILS, SHORT, VANISHES = 1, 2, 3
FAULTS = {
    "ENOSPC": (FAILS, errno.ENOSPC),
    "EIO": (FAILS, errno.EIO),
    "EACCES": (FAILS, errno.EACCES),
    "short": (SHORT, errno.ENOSPC),
    "vanishes": (VANISHES, 0),
}
arm = ctypes.CDLL(None).disk_arm
arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_int]
arm.restype = ctypes.c_long


def operations(folder, function, *, reads):
    """How many operations a function takes in a folder."""
    arm(str(folder).encode(), 0, 0, 0, reads)
    function()
    return arm(b"", 0, 0, 0, 0)


def struck(folder, function, fault, number, *, reads):
    """What a function raises where an operation in a folder fails; None where it raises nothing."""
    arm(str(folder).encode(), *FAULTS[fault], number, reads)
    try:
        function()
    except Exception as error:  # noqa: BLE001 - what it is, is what is asked
        return error
    finally:
        arm(b"", 0, 0, 0, 0)
    return None


def main(recipe: str, place: str) -> None:
    """Print what became of each fault, as JSON."""
    prepared = qf.Recipe.load(recipe).compile().prepare()
    prepared.step(next(prepared.batches()))
    folder = Path(place).resolve() / "checkpoints"
    folder.mkdir(parents=True)
    before, after, gone = folder / "step-1", folder / "step-2", folder.with_name("checkpoints.gone")
    prepared.save(before)
    found = []
    count = operations(folder, lambda: prepared.save(after), reads=0)
    shutil.rmtree(after)
    for fault in FAULTS:
        for number in range(1, count + 1):
            error = struck(folder, lambda: prepared.save(after), fault, number, reads=0)
            new = next((is_whole(path) for path in (after, gone / after.name) if path.exists()), None)
            if gone.exists():
                shutil.rmtree(folder, ignore_errors=True)
                gone.rename(folder)
            found.append(
                {
                    "does": "save",
                    "fault": fault,
                    "number": number,
                    "error": None if error is None else type(error).__name__,
                    "message": str(error),
                    "before": is_whole(before),
                    "after": new,
                }
            )
            shutil.rmtree(after, ignore_errors=True)
    weights = {name: part.detach().clone() for name, part in prepared.trained.items()}
    count = operations(folder, lambda: prepared.load(before), reads=1)
    prepared.step(next(prepared.batches()))
    stepped = {name: part.detach().clone() for name, part in prepared.trained.items()}
    for fault in FAULTS:
        if fault == "short":
            continue
        for number in range(1, count + 1):
            error = struck(folder, lambda: prepared.load(before), fault, number, reads=1)
            if gone.exists():
                gone.rename(folder)
            expected = weights if error is None else stepped
            found.append(
                {
                    "does": "load",
                    "fault": fault,
                    "number": number,
                    "error": None if error is None else type(error).__name__,
                    "message": str(error),
                    "before": is_whole(before),
                    "state": all(torch.equal(part, expected[name]) for name, part in prepared.trained.items()),
                }
            )
            if error is None:
                prepared.step(next(prepared.batches()))
                stepped = {name: part.detach().clone() for name, part in prepared.trained.items()}
    print(json.dumps(found))  # noqa: T201 - what the test reads


def is_whole(path):
    """Whether a checkpoint is what was written."""
    try:
        read_manifest(path)
    except qf.CheckpointError:
        return False
    return True


if __name__ == "__main__":
    main(*sys.argv[1:])
