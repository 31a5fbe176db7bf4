"""Comparing a backend with itself and with a reference, and the report of it."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn

import attrs
import torch

from qwenft.errors import ConformanceError, LeakError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from qwenft.kernels.layout import SequenceLayout

    Call = Callable[..., Tensor | tuple[Tensor, ...]]


@attrs.frozen
class ConformanceRow:
    """One check that passed.

    Args:
        case: the documents and heads.
        half: "attention", "conv" or "scan".
        check: what was measured.
        error: the largest error found: relative to a reference, or the change of a number of order 1.
        limit: the largest one allowed.
    """

    case: str
    half: str
    check: str
    error: float
    limit: float


@attrs.frozen
class ConformanceReport:
    """What a backend was checked for.

    Args:
        backend: its repr.
        device: where it ran.
        dtype: of its inputs.
        rows: one a check.
    """

    backend: str
    device: str
    dtype: str
    rows: tuple[ConformanceRow, ...]

    @property
    def summary(self) -> str:
        """It in a line."""
        found = [f"{self.backend} on {self.device} in {self.dtype}"]
        for words, kind in (
            ("other documents changed by", "other documents"),
            ("outputs off by", "output"),
            ("gradients off by", "gradient"),
        ):
            measured = any(row.check.startswith(kind) for row in self.rows)
            found.append(f"{words} {self.worst(kind):.0e}" if measured else f"{words}: not compared")
        return "; ".join(found)

    def worst(self, kind: str) -> float:
        """The largest error of the checks whose names begin with ``kind``; 0 where there were none."""
        return max((row.error for row in self.rows if row.check.startswith(kind)), default=0.0)

    def __str__(self) -> str:
        title = f"{self.backend} on {self.device} in {self.dtype}: {len(self.rows)} checks passed"
        wide = 2 + max(32, *(len(row.check) for row in self.rows))
        lines = [f"{'half':<15}{'check':<{wide}}{'worst error':>12}{'limit':>10}{'cases':>7}"]
        for half, check in dict.fromkeys((row.half, row.check) for row in self.rows):
            rows = [row for row in self.rows if (row.half, row.check) == (half, check)]
            worst = max(row.error for row in rows)
            lines.append(f"{half:<15}{check:<{wide}}{worst:>12.1e}{rows[0].limit:>10.0e}{len(rows):>7}")
        return "\n".join([title, *lines])


@attrs.frozen(repr=False)
class Verification:
    """What a plan's backends were proven by, on the machine and in the dtype of the run.

    Args:
        reports: of each attention slot, "full", "linear" and "vision".
    """

    reports: dict[str, ConformanceReport]

    def __repr__(self) -> str:
        return "\n".join(f"attention.{slot}: {report.summary}" for slot, report in self.reports.items())


@attrs.frozen
class Probe:
    """One function of a backend on one layout.

    Args:
        case: the documents and heads, for the report.
        half: "attention", "conv" or "scan".
        layout: where the documents begin.
        call: the backend's function of its inputs by position; returns the output, or that and a state.
        reference: what it should compute, or None for a backend that means to differ.
    """

    case: str
    half: str
    layout: SequenceLayout
    call: Call
    reference: Call | None


class Suite:
    """Runs checks of one backend and keeps their rows; the first one that fails raises.

    Args:
        backend: the backend, kept as ``.backend``.
        device: where to run it.
        dtype: of its inputs.
        tolerance: the largest relative error against a reference; by the dtype where None.
        fix: the line that mends a failure.
    """

    def __init__(
        self, backend: Any, device: str, dtype: str, tolerance: float | None, *, fix: str | None = None
    ) -> None:
        self.backend = backend
        self.fix = fix
        self.device = device
        self.dtype = dtype
        single = dtype in ("float32", "float64")
        self.tolerance = tolerance or (1e-4 if single else 2e-2)
        # Kernels that add up gradients in any order differ a little from run to run; a leak is far larger.
        self.leak_limit = 1e-5 if single else 1e-2
        self._generator = torch.Generator().manual_seed(0)
        self._rows: list[ConformanceRow] = []

    def random(self, *shape: int, dtype: str | None = None) -> Tensor:
        """Normal numbers, the same on every device."""
        numbers = torch.randn(*shape, generator=self._generator)
        return numbers.to(self.device, getattr(torch, dtype or self.dtype))

    def report(self) -> ConformanceReport:
        """What passed so far."""
        return ConformanceReport(repr(self.backend), self.device, self.dtype, tuple(self._rows))

    def isolation(
        self, probe: Probe, stream: dict[str, Tensor], other: dict[str, Tensor], shared: dict[str, Tensor]
    ) -> None:
        """Replace one document after the other, and see what changes in the outputs and gradients of the rest.

        Args:
            probe: the function and its layout.
            stream: inputs of T rows, its first arguments.
            other: the same with other numbers.
            shared: its last arguments, which no document owns.

        Raises:
            LeakError: another document changed.
            ConformanceError: a number is not finite.
        """
        if len(probe.layout) == 1:
            return
        # The gradients of shared inputs belong to all documents, so only those of the stream are compared.
        compared = ["output", *(f"gradient of {name}" for name in stream)]
        before = _run(probe.call, stream | shared)
        for what in compared:
            if not torch.isfinite(before[what]).all():
                self._add(probe, what, float("inf"), self.tolerance)
        for document, (start, stop) in enumerate(pairwise(probe.layout.starts)):
            changed = {name: _with_rows(tensor, other[name], start, stop) for name, tensor in stream.items()}
            after = _run(probe.call, changed | shared, other_rows=slice(start, stop))
            for what in compared:
                error = _largest_change(_without(after[what], start, stop), _without(before[what], start, stop))
                if not error <= self.leak_limit:
                    self._raise_leak(probe, document, what, error)
                self._add(probe, "other documents unchanged", error, self.leak_limit)

    def determinism(self, probe: Probe, inputs: dict[str, Tensor]) -> None:
        """Run twice: the output is the same to the bit.

        Raises:
            ConformanceError: it is not.
        """
        once, again = probe.call(*inputs.values()), probe.call(*inputs.values())
        error = max(_largest_change(a, b) for a, b in zip(_tuple(again), _tuple(once), strict=True))
        self._add(probe, "same output twice", error, 0.0)

    def buffers(self, probe: Probe, inputs: dict[str, Tensor]) -> None:
        """Run with NaN in all memory that torch hands out unwritten: none of it may be read.

        Raises:
            ConformanceError: an output or a gradient is not finite.
        """
        with _filled_with_nan():
            results = _run(probe.call, inputs)
        finite = all(torch.isfinite(result).all() for result in results.values())
        self._add(probe, "NaN in fresh buffers not read", 0.0 if finite else float("inf"), 0.0)

    def parity(self, probe: Probe, inputs: dict[str, Tensor]) -> None:
        """Compare outputs and the gradients of all inputs with a reference that is given the same in float32.

        Raises:
            ConformanceError: they differ, or are not finite.
        """
        if probe.reference is None:
            return
        got = _run(probe.call, inputs)
        expected = _run(probe.reference, {name: tensor.float() for name, tensor in inputs.items()})
        for what, right in expected.items():
            self._add(probe, what, relative_error(got[what], right), self.tolerance)

    def _add(self, probe: Probe, check: str, error: float, limit: float) -> None:
        if not error <= limit:
            where = f"{probe.half}, {probe.case}, {check}"
            msg = f"{self.backend!r} fails: {where}: relative error {error:.1e}, allowed {limit:.0e}"
            values = {"backend": self.backend, "half": probe.half, "case": probe.case, "check": check}
            raise ConformanceError(msg, fix=self.fix, error=error, limit=limit, **values)
        self._rows.append(ConformanceRow(probe.case, probe.half, check, error, limit))

    def _raise_leak(self, probe: Probe, document: int, what: str, error: float) -> NoReturn:
        msg = (
            f"{self.backend!r} leaks in its {probe.half}: {probe.case}: with other tokens in document {document}, "
            f"the {what} of other documents changed by {error:.1e}, allowed {self.leak_limit:.0e}"
        )
        fix = self.fix or "keep documents apart by the layout, or declare supports_packing = False"
        raise LeakError(msg, fix=fix, half=probe.half, backend=self.backend, error=error, case=probe.case)


@contextmanager
def _filled_with_nan() -> Iterator[None]:
    """torch.empty and its kin give NaN, which torch does in its deterministic mode alone."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    try:
        memory.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        with warnings.catch_warnings():
            # Of operations that have no deterministic form, which is not what is looked for here.
            warnings.filterwarnings("ignore", message=".*deterministic.*", category=UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of ``expected``; infinite where ``got`` is not finite."""
    if not torch.isfinite(got).all():
        return float("inf")
    difference = (got.double() - expected.double()).norm().item()
    # A gradient that is zero in exact arithmetic has no length to measure by; all inputs here are of order 1.
    return difference / max(expected.double().norm().item(), 0.1 * expected.numel() ** 0.5)


def _run(call: Call, inputs: dict[str, Tensor], *, other_rows: slice | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of a weighted sum of them; ``other_rows`` of the output get other weights."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    outputs = _tuple(call(*leaves.values()))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    if other_rows is not None:
        weights[0][other_rows] *= -2
    gradients = torch.autograd.grad(outputs, tuple(leaves.values()), weights)
    results = dict(zip(("output", "final state"), (output.detach() for output in outputs), strict=False))
    return results | {f"gradient of {name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _with_rows(tensor: Tensor, other: Tensor, start: int, stop: int) -> Tensor:
    return torch.cat([tensor[:start], other[start:stop], tensor[stop:]])


def _without(tensor: Tensor, start: int, stop: int) -> Tensor:
    return torch.cat([tensor[:start], tensor[stop:]])


def _largest_change(after: Tensor, before: Tensor) -> float:
    change = (after.double() - before.double()).abs()
    return float("inf") if change.isnan().any() else change.max().item()
