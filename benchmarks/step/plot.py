"""Draw results: tokens a second and peak memory of each pair of passes.

    python benchmarks/step/plot.py

Reads ``benchmarks/results/*.json`` and writes ``docs/step.png``.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    """Draw one pair of bars a result, with every run as a dot."""
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    figure, panels = plt.subplots(1, 2, figsize=(8, 0.9 + 0.9 * len(results)), layout="constrained")
    for panel, name, title, scale in (
        (panels[0], "rate", "tokens a second", 1),
        (panels[1], "peak", "peak above the weights, GiB", 2**30),
    ):
        ticks, labels = [], []
        for row, result in enumerate(results):
            for offset, (side, runs) in zip((0.2, -0.2), result["passes"].items(), strict=True):
                values = sorted(run[name] / scale for run in runs)
                place = -row + offset
                panel.barh(place, values[len(values) // 2], 0.36, color="#3465a4" if side == "ours" else "#bbbbbb")
                panel.plot(values, [place] * len(values), "k.", markersize=4)
                ticks.append(place)
                labels.append(f"{result['job']}: {'qwenft' if side == 'ours' else side}")
        panel.set_yticks(ticks, labels)
        panel.set_title(title)
    figure.savefig(ROOT / "docs" / "step.png", dpi=120)


if __name__ == "__main__":
    main()
