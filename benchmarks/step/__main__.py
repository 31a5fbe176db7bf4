"""A training step against what people run today: HF Trainer with peft, and TRL, on the same documents.

    sh benchmarks/step/install_peers.sh
    python benchmarks/step --job small --against hf --runs 5 --threads 1

Each measurement is a process of its own, the sides alternate, and a ratio is taken within a pair: the median of
the pairs, with the lowest and the highest. Loss and adapter gradients of four documents are compared first, and
nothing is timed where they differ. Kernels, bytes moved and live bytes are counted, and the same on every run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from ceiling import flops, products, rate
from job import write_job
from measuring import documents_of
from safetensors.torch import load_file

HERE = Path(__file__).parent
PEERS = HERE.parent.parent / ".venv-peers" / "bin" / "python"
MOST_ERROR = 1e-5
GIB = 2**30


class Harness:
    """Runs the sides of a job in processes of their own."""

    def __init__(self, asked: argparse.Namespace, job: Path) -> None:
        self.asked = asked
        self.job = job

    def measure(self, side: str, what: str) -> Path:
        """The file that a side leaves."""
        out = self.job / f"{side}-{what}"
        python, script = (sys.executable, "ours.py") if side == "ours" else (str(PEERS), "trainers.py")
        threads = self.asked.threads if what == "pass" else os.cpu_count()
        options = {"job": self.job, "trainer": side, "measure": what, "out": out, "threads": threads}
        command = [python, str(HERE / script), *(f"--{name}={value}" for name, value in options.items())]
        if side != "ours":
            command.append(f"--batch={self.asked.batch}")
        command.append("--checkpointing" if self.asked.checkpointing else "--no-checkpointing")
        run = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own scripts
        if run.returncode:
            raise SystemExit(f"{side}, {what}: exit status {run.returncode}\n{run.stderr[-3000:]}")
        return out

    def numbers(self, side: str, what: str) -> dict[str, Any]:
        """What a side measured."""
        return dict(json.loads(self.measure(side, what).read_text()))

    def require_equal(self) -> float:
        """The largest relative difference of a document's loss or whole adapter gradient."""
        ours, theirs = (load_file(self.measure(side, "documents")) for side in ("ours", self.asked.against))
        if ours.keys() != theirs.keys():
            raise SystemExit(f"the sides train other adapters: {sorted(ours.keys() ^ theirs.keys())[:4]}")
        worst = 0.0
        for document in sorted({name.split(":")[0] for name in ours}):
            gradients = [n for n in ours if n.startswith(f"{document}:") and not n.endswith(":loss")]
            for names in ([f"{document}:loss"], gradients):
                wanted = torch.cat([theirs[name].flatten() for name in names])
                got = torch.cat([ours[name].flatten() for name in names])
                worst = max(worst, float((got - wanted).norm() / wanted.norm()))
        if not worst < MOST_ERROR:
            raise SystemExit(f"the sides differ by {worst:.1e}: nothing is timed")
        return worst


def main() -> None:
    """Measure, print, and leave the numbers in results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", choices=["small", "real"], default="small")
    parser.add_argument("--against", choices=["hf", "trl"], default="hf")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="documents a batch of the other side")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    asked = parser.parse_args()
    if not PEERS.exists():
        raise SystemExit("the other trainers are not installed: sh benchmarks/step/install_peers.sh")
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as place:
        job = Path(place)
        write_job(asked.job, job)
        result = measured(asked, Harness(asked, job), job)
    print(text(result))
    asked.out.mkdir(exist_ok=True)
    options = f"{f'-batch{asked.batch}' * (asked.batch > 1)}{'-checkpointing' * asked.checkpointing}"
    name = f"{asked.job}-{asked.against}-{asked.threads}{options}.json"
    (asked.out / name).write_text(json.dumps(result, indent=1) + "\n")


def measured(asked: argparse.Namespace, harness: Harness, job: Path) -> dict[str, Any]:
    """Everything about a job, as JSON values."""
    rows = documents_of(job)
    lengths = [len(row["input_ids"]) for row in rows]
    supervised = sum(label != -100 for row in rows for label in row["labels"])
    sides = ("ours", asked.against)
    error = harness.require_equal()
    counts = {side: harness.numbers(side, "counts") for side in sides}
    passes: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    rates = []
    for _ in range(asked.runs):
        rates.append(rate(asked.job))
        for side in sides:
            passes[side].append(harness.numbers(side, "pass"))
    return {
        "job": asked.job,
        "against": asked.against,
        "threads": asked.threads,
        "batch": asked.batch,
        "checkpointing": asked.checkpointing,
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "versions": {side: runs[0]["versions"] for side, runs in passes.items()},
        "lengths": lengths,
        "supervised": supervised,
        "difference": error,
        "counts": counts,
        "passes": passes,
        "flops": flops(products(asked.job, lengths, supervised)),
        "flops_per_second": rates,
    }


def text(result: dict[str, Any]) -> str:
    """The numbers for people."""
    ours, theirs = result["passes"]["ours"], result["passes"][result["against"]]
    counted, other = result["counts"]["ours"], result["counts"][result["against"]]
    lengths, share = result["lengths"], result["supervised"] / sum(result["lengths"])
    lines = [
        f"{result['job']} against {result['against']}, batches of {result['batch']}",
        f"float32, {result['threads']} thread(s), checkpointing {'on' if result['checkpointing'] else 'off'}",
        result["machine"],
        *(f"{side}: {', '.join(map(' '.join, found.items()))}" for side, found in result["versions"].items()),
        f"{len(lengths)} documents of {min(lengths)} to {max(lengths)} tokens, {share:.0%} supervised",
        f"loss and adapter gradients agree to {result['difference']:.1e}",
    ]
    for name, title, scale in (("rate", "tokens/s", 1), ("peak", "peak, GiB", GIB)):
        sides = [spread([run[name] / scale for run in runs], ".2f") for runs in (ours, theirs)]
        ratios = spread([a[name] / b[name] for a, b in zip(ours, theirs, strict=True)], ".2f")
        lines.append(f"{title:<22} {sides[0]} against {sides[1]}: {ratios}")
    counts = (
        ("kernels", "kernels/supervised", 1),
        ("moved", "MB moved/supervised", 1e6),
        ("live", "most live, GiB", GIB),
    )
    for name, title, scale in counts:
        sides = [f"{side[name] / scale:.1f}" for side in (counted, other)]
        lines.append(f"{title:<22} {sides[0]} against {sides[1]}: {counted[name] / other[name]:.2f}")
    for side, runs in result["passes"].items():
        # The best rate of all: one that was taken while the machine was busy is no limit.
        limit = max(result["flops_per_second"])
        shares = [result["flops"] / run["seconds"] / limit for run in runs]
        lines.append(f"of the products' limit, {side}: {spread(shares, '.0%')}")
    return "\n".join(lines)


def spread(values: list[float], style: str) -> str:
    """The median, and the lowest and the highest."""
    return f"{statistics.median(values):{style}} ({min(values):{style}} to {max(values):{style}})"


if __name__ == "__main__":
    main()
