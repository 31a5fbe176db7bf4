"""What a plan has to say: errors, what blocks it here, and notes."""

from __future__ import annotations

from typing import Literal

import attrs

from qwenft.display import html_table

Level = Literal["error", "blocked", "note"]
LEVELS: tuple[Level, ...] = ("error", "blocked", "note")


@attrs.frozen
class Finding:
    """One thing that was found, with its place and its remedy.

    Args:
        level: "error", wrong on any machine; "blocked", right but not here; "note", what was chosen or is lost.
        place: where in the recipe: "data.packing".
        problem: what was got and what was expected.
        fix: the line that mends it.
    """

    level: Level
    place: str
    problem: str
    fix: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.place}: {self.problem}"]
        if self.fix is not None:
            lines.append(f"     Fix: {self.fix}")
        return "\n".join(lines)


class Findings(tuple[Finding, ...]):
    """All that a plan has to say, errors first."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "\n".join(f"{finding.level}: {finding}" for finding in self) or "nothing to say"

    def _repr_html_(self) -> str:
        rows = [
            (one.level, one.place, f"{one.problem}\nFix: {one.fix}" if one.fix else one.problem) for one in self
        ]
        return html_table(("", "where", "finding"), rows)


def error(place: str, problem: str, fix: str | None = None) -> Finding:
    """Wrong on any machine."""
    return Finding("error", place, problem, fix)


def blocked(place: str, problem: str, fix: str | None = None) -> Finding:
    """Right, but not here."""
    return Finding("blocked", place, problem, fix)


def note(place: str, problem: str) -> Finding:
    """Worth knowing."""
    return Finding("note", place, problem)
