"""Draw results: how many times the tokens a second, and what share of the peak memory, in each pair of passes.

    python benchmarks/step/plot.py

Reads ``benchmarks/results/*.json`` and writes ``docs/step.png``.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent.parent
NAMES = {"hf": "HF Trainer + peft", "trl": "TRL"}


def main() -> None:
    """Draw a bar a result, the median of its pairs, with every pair as a dot."""
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    figure, panels = plt.subplots(1, 2, figsize=(8, 0.9 + 0.55 * len(results)), sharey=True, layout="constrained")
    labels = [
        f"{result['job']}, {result['threads']} thread{'s' * (result['threads'] > 1)}\n"
        f"against {NAMES[result['against']]}, {result['machine'].split()[-1]}"
        for result in results
    ]
    for panel, name, title in (
        (panels[0], "rate", "times the tokens a second"),
        (panels[1], "peak", "share of the peak memory"),
    ):
        for place, result in enumerate(results):
            ours, theirs = result["passes"]["ours"], result["passes"][result["against"]]
            ratios = [a[name] / b[name] for a, b in zip(ours, theirs, strict=True)]
            panel.barh(place, statistics.median(ratios), 0.6, color="#3465a4")
            panel.plot(ratios, [place] * len(ratios), "k.", markersize=4)
        panel.axvline(1, color="#888888", linewidth=1)
        panel.set_title(title)
    panels[0].set_yticks(range(len(results)), labels)
    panels[0].invert_yaxis()
    figure.savefig(ROOT / "docs" / "step.png", dpi=120)


if __name__ == "__main__":
    main()
