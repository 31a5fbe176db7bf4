"""Which backend "auto" stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import attrs

from qwenft.capabilities import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenft.machine import Machine

B = TypeVar("B", bound=Backend)


@attrs.frozen
class Choice(Generic[B]):
    """A chosen backend.

    Args:
        backend: the first candidate that can.
        passed_over: the better ones that cannot, each with why.
    """

    backend: B
    passed_over: tuple[str, ...]


def choose(
    candidates: Sequence[B], problem: Any, machine: Machine, *, packed: bool, compute_dtype: str
) -> Choice[B]:
    """The first candidate, best first, that computes the problem exactly on the machine.

    Args:
        candidates: best first; the last must always be able to.
        problem: what the layers ask.
        machine: where.
        packed: documents share rows.
        compute_dtype: the dtype of the computation.
    """
    passed_over: list[str] = []
    for backend in candidates:
        reason = _hindrance(backend, problem, machine, packed=packed, compute_dtype=compute_dtype)
        if reason is None:
            return Choice(backend, tuple(passed_over))
        passed_over.append(f"{backend.name} ({reason})")
    msg = f"no backend can: {', '.join(passed_over)}"
    raise AssertionError(msg)


def _hindrance(
    backend: Backend, problem: Any, machine: Machine, *, packed: bool, compute_dtype: str
) -> str | None:
    if not (availability := backend.availability(machine)).usable:
        return availability.reason
    if packed and not backend.supports_packing:
        return "cannot pack"
    if backend.needs_half_precision and compute_dtype == "float32":
        return "computes in 16 bits only"
    return backend.refuses(problem)
