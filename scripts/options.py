"""Writes docs/options.md: every option of every spec, from their own docstrings."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import attrs

import qwenft as qf
from qwenft.specs.images import ImageSpec
from qwenft.specs.model import Quantization

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
SPECS: tuple[Any, ...] = (
    qf.Recipe,
    qf.ModelSpec,
    Quantization,
    qf.AdapterSpec,
    qf.AttentionSpec,
    qf.DataSpec,
    ImageSpec,
    qf.TrainingSpec,
    qf.ParallelSpec,
)


def described(cls: Any) -> dict[str, str]:
    """The arguments of a class and what its docstring says of them."""
    lines = (inspect.getdoc(cls) or "").partition("Args:\n")[2].split("\n\n")[0]
    entries = re.split(r"\n(?= {4}\w+: )", f"\n{lines}")[1:]
    pairs = (entry.strip().partition(": ") for entry in entries)
    return {name: " ".join(text.split()) for name, _, text in pairs}


def default(field: Any) -> str:
    """What an argument is where it is not given, as code."""
    if field.default is attrs.NOTHING:
        return ""
    value = field.default.factory() if isinstance(field.default, attrs.Factory) else field.default
    return f"`{value!r}`"


def cell(text: str) -> str:
    """Text that may hold what ends a cell of a table; what docstrings mark as code is code here too."""
    return re.sub(r":\w+:`([^`]+)`", r"`\1`", text).replace("``", "`").replace("|", "\\|")


def section(cls: Any) -> str:
    """A spec: its options, its methods, and what other libraries call them."""
    told = described(cls)
    rows = [f"| `{field.name}` | {default(field)} | {cell(told[field.name])} |" for field in attrs.fields(cls)]
    options = ["| option | default | |", "|---|---|---|", *rows]
    methods = [
        f"- `.{name}`: {cell((inspect.getdoc(method) or '').splitlines()[0])}"
        for name, method in vars(cls).items()
        if not name.startswith("_") and (inspect.isfunction(method) or isinstance(method, classmethod))
    ]
    renamed = [f"| `{theirs}` | {cell(f'`{ours}`')} |" for theirs, ours in getattr(cls, "RENAMED", {}).items()]
    others = ["| elsewhere | here |", "|---|---|", *renamed] if renamed else []
    summary = cell((inspect.getdoc(cls) or "").splitlines()[0])
    parts = [f"## {cls.__name__}", summary, *map("\n".join, (options, methods, others))]
    return "\n\n".join(part for part in parts if part)


def page() -> str:
    """The whole page."""
    head = (
        "# Options\n\nEvery option of every spec, its default, and what it is; `python scripts/options.py` writes "
        "this page from the\ndocstrings. An option that is misspelt is refused, and so are the names of other "
        "libraries, with what stands for them."
    )
    return "\n\n".join([head, *map(section, SPECS)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
