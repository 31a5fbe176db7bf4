"""The errors of qwenft: one root, and leaves that are also the builtin a caller would expect."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from qwenft.plan.findings import Finding


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing where no known word is near."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


class QwenftError(Exception):
    """The root of every error that qwenft raises on purpose.

    Args:
        problem: what was got and what was expected, in one sentence.
        fix: the line that mends it.
        values: what the sentence speaks of, kept as attributes of the error for programs to read.
    """

    def __init__(self, problem: str, *, fix: str | None = None, **values: Any) -> None:
        super().__init__(problem if fix is None else f"{problem}\n  Fix: {fix}")
        self.problem = problem
        self.fix = fix
        self.values = values

    def __getattr__(self, name: str) -> Any:
        values: dict[str, Any] = self.__dict__.get("values", {})
        if name in values:
            return values[name]
        msg = f"{type(self).__name__} has no {name!r}; it carries {', '.join(values) or 'no values'}"
        raise AttributeError(msg)


class SpecError(QwenftError, ValueError):
    """A field or an argument is misspelt, ill-typed or out of range (`.got`, `.expected`)."""


class PlanError(QwenftError, ValueError):
    """A recipe is wrong; `.findings` holds all that is wrong with it."""

    def __init__(self, findings: Sequence[Finding], *, subject: str = "in this recipe") -> None:
        count = f"{len(findings)} problem{'s' if len(findings) != 1 else ''} {subject}"
        lines = [f"  {number}. {finding}" for number, finding in enumerate(findings, start=1)]
        super().__init__("\n".join([count, *lines]), findings=tuple(findings))


class DataError(QwenftError, ValueError):
    """The data cannot be used; `.file` and `.row` (counted from 1) say where."""


class BackendUnavailable(QwenftError, ImportError):  # noqa: N818 - a public name that reads as a state
    """A backend was named that is not installed, or cannot run, on this machine."""


class LeakError(QwenftError, RuntimeError):
    """Packed documents reached each other: `.half` ("attention", "conv" or "scan"), `.backend`, `.error`."""


class ConformanceError(QwenftError, RuntimeError):
    """A backend computes something else than it should, without a leak.

    `.backend`, `.half`, `.case`, `.check` (the output, or the gradient of what), `.error`, `.limit`.
    """


class NonFiniteError(QwenftError, FloatingPointError):
    """A loss or a gradient is not finite: `.step`, `.loss`, `.grad_norm`, `.documents` ((file, row) pairs).

    `.layer` is the module of forward, or the weight of backward, in which it began; None where that is not known.
    A run adds `.checkpoint`, the newest that is whole.
    """


class OutOfMemoryError(QwenftError, MemoryError):
    """A step did not get the memory that it asked for: `.step`, `.documents`, `.tokens`, `.planned`, `.used`."""


class RankError(QwenftError, RuntimeError):
    """One of several processes cannot go on, and so none does (`.rank`)."""


class CheckpointError(QwenftError, OSError):
    """A model folder, run folder or export cannot be read or written (`.path`)."""


class DamagedError(CheckpointError):
    """The files of a checkpoint are not what was written."""
