"""Plans and runs as HTML for notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenft.display import bytes_text, html_bar, html_chart, html_table, html_view
from qwenft.reports.curves import Curves
from qwenft.reports.text import COVERAGE, bar_parts, coverage_rows, facts, verdict_text

if TYPE_CHECKING:
    from qwenft.run import Run
    from qwenft.training_plan import TrainingPlan

_NOTICES = 5  # the newest, that are shown


def render_plan(plan: TrainingPlan) -> str:
    """The whole plan as tables."""
    return html_view(
        "TrainingPlan",
        html_table((), [fact for fact in facts(plan) if fact[0]]),
        memory_bar(plan) if plan.forecast.memory_is_known else "",
        html_table(COVERAGE, coverage_rows(plan), right=(2, 3, 4)),
        plan.findings._repr_html_(),
    )


def memory_bar(plan: TrainingPlan) -> str:
    """What fills a process's memory in the largest step, as a coloured bar with its legend."""
    return html_bar(bar_parts(plan), bytes_text, verdict_text(plan))


def render_run(run: Run) -> str:
    """The curve of the loss, what the run came to, and what the user was told on the way."""
    steps = [record for record in run.history if "loss" in record]
    rows = [("folder", str(run.folder)), ("ending", run.ending)]
    if steps:
        rows.append(("steps", f"{steps[-1]['step']:,} of {run.steps:,}"))
        rows.append(("loss", f"{steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f}"))
        rows.append(("tokens a second", f"{steps[-1]['tokens_per_second']:,.0f}"))
    if losses := run.held_out_losses:
        rows.append(("held out", f"{losses[0][1]:.4f} to {losses[-1][1]:.4f}"))
    if run.best_step is not None:
        rows.append(("best step", f"{run.best_step:,}"))
    rows += [("notice", notice) for notice in run.notices[-_NOTICES:]]
    return html_view("Run", html_chart(*Curves(len(steps), run.history).loss), html_table((), rows))
