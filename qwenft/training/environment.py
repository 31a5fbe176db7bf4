"""What a run is made with: versions, hardware, and the state of the sources around it."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from typing import Any

import torch

from qwenft.machine import Machine

_LIBRARIES = ("qwenft", "torch", "transformers", "peft", "bitsandbytes", "datasets", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Of the interpreter and of the libraries that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


def environment() -> dict[str, Any]:
    """JSON values of ``environment.json``: `versions`, `hardware`, and `git` (None outside of a repository).

    They hold no path, no variable of the environment and no address.
    """
    machine = Machine.detect()
    hardware = {
        "name": machine.name,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": machine.cores,
        "threads": torch.get_num_threads(),  # on which the bits of sums depend on a CPU
        "host_bytes": machine.host_bytes,
        "accelerators": machine.accelerators,
        "accelerator_bytes": machine.accelerator_bytes,
        "cuda": torch.version.cuda,
    }
    return {"versions": versions(), "hardware": hardware, "git": _git_state()}


def _git_state() -> dict[str, Any] | None:
    """The commit of the repository around the working directory, and how many of its files have changed since."""
    commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    if commit is None or changed is None:
        return None
    return {"commit": commit.strip(), "changed_files": len(changed.splitlines())}


def _git(*arguments: str) -> str | None:
    # A repository can name a program of its own that tells what has changed.
    command = ["git", "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603 - git
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
