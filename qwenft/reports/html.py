"""Plans as HTML for notebooks: no external files, readable on light and dark grounds."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from qwenft.reports.text import COVERAGE, bar_parts, bytes_text, coverage_rows, facts, verdict_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenft.training_plan import TrainingPlan

# A finding keeps its line breaks; a word that is too long breaks rather than hang over.
_CELL = "padding:2px 10px;vertical-align:top;white-space:pre-line;overflow-wrap:break-word;text-align:"

#: Readable on light and dark grounds, and by people who do not see red or green (the palette of Okabe and Ito).
_COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#f0e442",
    "#999999",
    "#666666",
    "#444444",
)
_FREE = "transparent"


def render_plan(plan: TrainingPlan) -> str:
    """The whole plan as tables."""
    findings = [
        (
            finding.level,
            finding.place,
            f"{finding.problem}\nFix: {finding.fix}" if finding.fix else finding.problem,
        )
        for finding in plan.findings
    ]
    return "".join(
        [
            '<div style="max-width:700px">',
            html_table((), [fact for fact in facts(plan) if fact[0]]),
            memory_bar(plan) if plan.forecast.memory_is_known else "",
            html_table(COVERAGE, coverage_rows(plan), right=(2, 3, 4)),
            html_table(("", "where", "finding"), findings),
            "</div>",
        ]
    )


def memory_bar(plan: TrainingPlan) -> str:
    """What fills a process's memory in the largest step, as a coloured bar with its legend."""
    parts = bar_parts(plan)
    whole = sum(count for _, count in parts)
    colours = [_FREE if name == "free" else colour for (name, _), colour in zip(parts, _COLOURS, strict=False)]
    blocks = "".join(
        f'<div style="width:{100 * count / whole:.2f}%;background:{colour}" title="{escape(name)}"></div>'
        for (name, count), colour in zip(parts, colours, strict=True)
    )
    legend = " ".join(
        f'<span style="white-space:nowrap;margin-right:10px"><span style="color:{colour}">&#9632;</span> '
        f"{escape(name)} {bytes_text(count)}</span>"
        for (name, count), colour in zip(parts, colours, strict=True)
    )
    frame = "display:flex;height:18px;max-width:680px;border:1px solid #8888;margin:4px 10px"
    below = f"{escape(verdict_text(plan))}<br>{legend}"
    return f'<div style="{frame}">{blocks}</div><div style="margin:0 10px">{below}</div>'


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table whose cells are text: whatever they hold is escaped."""

    def line(tag: str, cells: Sequence[str]) -> str:
        sides = ["right" if column in right else "left" for column in range(len(cells))]
        inner = "".join(
            f'<{tag} style="{_CELL}{side}">{escape(cell)}</{tag}>' for side, cell in zip(sides, cells, strict=True)
        )
        return f"<tr>{inner}</tr>"

    head = f"<thead>{line('th', header)}</thead>" if header else ""
    body = "".join(line("td", row) for row in rows)
    return f'<table style="margin:6px 0">{head}<tbody>{body}</tbody></table>'
