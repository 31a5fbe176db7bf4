"""Plans as HTML for notebooks: no external files, readable on light and dark grounds."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from qwenft.reports.text import coverage_rows, facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenft.training_plan import TrainingPlan

_CELL = "text-align:left;padding:2px 10px;vertical-align:top"


def render_plan(plan: TrainingPlan) -> str:
    """The whole plan as tables."""
    findings = [(finding.level, finding.place, finding.problem, finding.fix or "") for finding in plan.findings]
    return "".join(
        [
            '<div style="max-width:900px">',
            html_table((), facts(plan)),
            html_table(("role", "modules", "layers", "trained", "of"), coverage_rows(plan)),
            html_table(("", "where", "finding", "fix"), findings),
            "</div>",
        ]
    )


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are text: whatever they hold is escaped."""
    head = "".join(f'<th style="{_CELL}">{escape(cell)}</th>' for cell in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{escape(cell)}</td>' for cell in row) + "</tr>" for row in rows
    )
    return f'<table style="margin:6px 0"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
