"""Plans as HTML for notebooks: no external files, readable on light and dark grounds."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from qwenft.reports.text import COVERAGE, coverage_rows, facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenft.training_plan import TrainingPlan

# A finding keeps its line breaks; a word that is too long breaks rather than hang over.
_CELL = "padding:2px 10px;vertical-align:top;white-space:pre-line;overflow-wrap:break-word;text-align:"


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
            html_table((), facts(plan)),
            html_table(COVERAGE, coverage_rows(plan), right=(2, 3, 4)),
            html_table(("", "where", "finding"), findings),
            "</div>",
        ]
    )


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
