"""How values are shown: as text in a terminal, and in a notebook as HTML without external files."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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


class Shown(ABC):
    """A value that is shown by its name and a table of what it says."""

    __slots__ = ()

    @abstractmethod
    def shown(self) -> list[tuple[str, str]]:
        """What it says, a name and a value a line."""

    def __repr__(self) -> str:
        return "\n".join([type(self).__name__, text_table(("", ""), self.shown()).removeprefix("\n")])

    def _repr_html_(self) -> str:
        return html_view(type(self).__name__, html_table((), self.shown()))


def bytes_text(count: float) -> str:
    """A number of bytes for people.

    Examples:
        >>> bytes_text(1536)
        '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def time_text(seconds: float) -> str:
    """A time for people.

    Examples:
        >>> time_text(59.7), time_text(3661), time_text(200_000)
        ('1:00', '1:01:01', '55:33:20')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns as wide as they need to be; those in ``right`` are aligned there."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def html_view(title: str, *parts: str) -> str:
    """Parts below a title, no wider than a column of text."""
    return f'<div style="max-width:700px;overflow-x:auto"><strong>{escape(title)}</strong>{"".join(parts)}</div>'


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


def html_bar(
    parts: Sequence[tuple[str, float]], text: Callable[[float], str], note: str = "", rest: str = "free"
) -> str:
    """Parts of a whole as a coloured bar, with a legend that says each in words; the rest is left empty."""
    whole = sum(count for _, count in parts) or 1
    colours = [_FREE if name == rest else colour for (name, _), colour in zip(parts, _COLOURS, strict=False)]
    blocks = "".join(
        f'<div style="width:{100 * count / whole:.2f}%;background:{colour}" title="{escape(name)}"></div>'
        for (name, count), colour in zip(parts, colours, strict=True)
    )
    legend = " ".join(
        f'<span style="white-space:nowrap;margin-right:10px"><span style="color:{colour}">&#9632;</span> '
        f"{escape(name)} {escape(text(count))}</span>"
        for (name, count), colour in zip(parts, colours, strict=True)
    )
    frame = "display:flex;height:18px;max-width:680px;border:1px solid #8888;margin:4px 10px"
    below = "".join(f'<div style="margin:0 10px">{line}</div>' for line in (escape(note), legend) if line)
    return f'<div style="{frame}">{blocks}</div>{below}'


class Line(NamedTuple):
    """One of the lines of a chart.

    Args:
        name: in the legend.
        points: x and y.
        style: "line", "faint", or "dots" with a line between them.
        colour: the number of its colour.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "line"
    colour: int = 0


def html_chart(*lines: Line, height: int = 120) -> str:
    """Lines over the same steps, of what is finite, which say their ends in words too; nothing for no line."""
    drawn = [
        line._replace(points=points)
        for line in lines
        if len(points := [point for point in line.points if math.isfinite(point[1])]) > (line.style != "dots")
    ]
    if not drawn:
        return ""
    xs, ys = zip(*(point for line in drawn for point in line.points), strict=True)
    low, high = min(ys), max(ys)
    across, up = max(xs) - min(xs) or 1, high - low or 1

    def placed(x: float, y: float) -> tuple[float, float]:
        return (x - min(xs)) / across * _CHART, (high - y) / up * height

    shapes = "".join(_shape(line, [placed(*point) for point in line.points]) for line in drawn)
    said = [f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in drawn]
    # Most curves fall: there is room above their end and below their beginning.
    scale = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{side}" font-size="11" fill="currentColor">{value:.4g}</text>'
        for x, y, side, value in ((_CHART, 9, "end", high), (0, height - 2, "start", low))
    )
    legend = " ".join(
        f'<span style="margin-right:10px;white-space:nowrap"><span style="color:{_COLOURS[line.colour]}">'
        f"{_MARKS[line.style]}</span> {escape(text)}</span>"
        for line, text in zip(drawn, said, strict=True)
    )
    return (
        f'<svg viewBox="-4 -4 {_CHART + 8} {height + 8}" style="max-width:{_CHART}px;width:100%" role="img" '
        f'aria-label="{escape("; ".join(said))}">{shapes}{scale}</svg><div style="margin:0 10px">{legend}</div>'
    )


_CHART = 680  # pixels
_MARKS = {"line": "&#9473;", "faint": "&#9472;", "dots": "&#9679;"}


def _shape(line: Line, points: Sequence[tuple[float, float]]) -> str:
    colour = _COLOURS[line.colour]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    strength = 'stroke-width="1" stroke-opacity="0.7"' if line.style == "faint" else 'stroke-width="2"'
    shape = f'<polyline points="{path}" fill="none" stroke="{colour}" {strength}/>'
    if line.style != "dots":
        return shape
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points)
    return (shape if len(points) > 1 else "") + dots
