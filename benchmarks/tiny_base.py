"""What the quickstart teaches the tiny base, for three seeds: ``python benchmarks/tiny_base.py``.

Each is a process of its own, from its start to its end; where others use the machine, its processor seconds say
more.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from qwenft.testing import tiny_base

SEEDS = (0, 1, 2)
RESULT = Path(__file__).parent / "results" / "tiny_base.json"


def taught(seed: int, folder: Path) -> dict[str, Any]:
    """How long a quickstart takes, and what is answered exactly before and after."""
    started, before = time.monotonic(), os.times()
    asked = [sys.executable, "-m", "qwenft.quickstart", "--seed", str(seed), "--run-dir", str(folder)]
    subprocess.run(asked, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603 - our own
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    seconds = {"wall": round(time.monotonic() - started, 1), "processor": round(processor, 1)}
    found = json.loads((folder / "exact_match.json").read_text(encoding="utf-8"))
    others = [shares for name, shares in found.items() if name != "ticket"]
    means = [sum(side) / len(others) for side in zip(*others, strict=True)]
    return {"seed": seed, "seconds": seconds, "exact_match": found, "mean_of_other_skills": means}


def main() -> None:
    """Measure, and write."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [taught(seed, Path(folder) / str(seed)) for seed in SEEDS]
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "base": json.loads((tiny_base() / "skills.json").read_text(encoding="utf-8")),
        "quickstart": runs,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for run in runs:
        before, after = run["exact_match"]["ticket"]
        others = " to ".join(f"{mean:.3f}" for mean in run["mean_of_other_skills"])
        print(f"seed {run['seed']}  {run['seconds']}  ticket {before:.3f} to {after:.3f}  others {others}")


if __name__ == "__main__":
    main()
