"""Runs that are killed at random moments, half of them inside a save, and continued to their end."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import qwenft as qf
from qwenft.training.checkpoint import read_manifest
from qwenft.training.run_folder import RunFolder

#: Seconds from the start of a run's process until it is killed, at the most, if no save is waited for.
LONGEST = 2.5


def begun(plan, folder):
    """A process that trains; what is read and proven once for a plan has been already."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            plan.train(folder, verbose=0)
            code = 0
        finally:
            os._exit(code)
    return process


def has_ended(process):
    """Whether a process went to its end by itself."""
    ended, status = os.waitpid(process, os.WNOHANG)
    if ended and status:
        msg = f"the run failed: {status}"
        raise RuntimeError(msg)
    return bool(ended)


def killed(process, folder, *, in_save, chance):
    """Kill a process at a random moment, or in a save; False where it had ended before."""
    until = time.monotonic() + chance.uniform(0, LONGEST)
    after = chance.randrange(1, 8)  # saves
    seen = set()
    while in_save or time.monotonic() < until:
        if has_ended(process):
            return False
        if in_save:
            seen |= {path.name for path in folder.glob("checkpoints/.step-*.writing")}
            if len(seen) >= after:
                time.sleep(chance.uniform(0, 0.01))
                break
        else:
            time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return True


def main(recipe: str, place: str, kills: str, seed: str) -> None:
    """Print what was found, as JSON."""
    plan = qf.Recipe.load(recipe).compile()
    _ = plan.data
    plan.verify()
    chance, folder = random.Random(int(seed)), Path(place)
    done = {"random": 0, "in save": 0, "runs": 0, "lives": 0, "damaged": [], "different": []}
    _train_whole(plan, folder / "whole")
    while done["random"] + done["in save"] < int(kills):
        in_save = done["in save"] < done["random"]
        process = begun(plan, folder / "run")
        done["lives"] += 1
        if killed(process, folder / "run", in_save=in_save, chance=chance):
            done["in save" if in_save else "random"] += 1
        elif _result(folder / "run") != _result(folder / "whole"):
            done["different"].append(done["runs"])
        else:
            done["runs"] += 1
            shutil.rmtree(folder / "run")
        done["damaged"] += _damaged(folder / "run")
    while (folder / "run").exists():
        process = begun(plan, folder / "run")
        _, status = os.waitpid(process, 0)
        if status or _result(folder / "run") != _result(folder / "whole"):
            done["different"].append(done["runs"])
        done["runs"] += 1
        shutil.rmtree(folder / "run")
    print(json.dumps(done))  # noqa: T201 - what the test reads


def _train_whole(plan, folder):
    process = begun(plan, folder)
    if os.waitpid(process, 0)[1]:
        msg = "the uninterrupted run failed"
        raise RuntimeError(msg)


def _result(folder):
    """The bytes of what a run leaves, and its losses."""
    files = {path.name: path.read_bytes() for path in (folder / "adapter").glob("*.safetensors")}
    return files, [(record["step"], record["loss"]) for record in RunFolder(folder).history]


def _damaged(folder):
    """Files under final names that are not whole."""
    found = []
    for path in RunFolder(folder).checkpoints.values():
        try:
            read_manifest(path)
        except qf.CheckpointError as error:
            found.append(str(error))
    for path in folder.glob("*.json"):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            found.append(f"{path}: {error}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
