"""Backends: what is named is used or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenft.plan.findings import blocked, error, note

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwenft.plan.draft import Draft
    from qwenft.plan.findings import Finding


def vision_attention(draft: Draft) -> Iterator[Finding]:
    """A backend of the tower must have a tower."""
    if draft.attention.vision != "auto" and draft.architecture.is_text_only:
        yield error(
            "attention.vision",
            f"{draft.attention.vision!r} would attend in a tower that is not loaded",
            "recipe.with_model(vision=True), or leave vision out",
        )


def packing_is_exact(draft: Draft) -> Iterator[Finding]:
    """Packed documents must stay apart in both halves."""
    packed = [
        data for data in (draft.data, getattr(draft.data, "held_out", None)) if getattr(data, "packed", False)
    ]
    for slot in draft.slots:
        # The tower is given image by image where its backend cannot keep them apart.
        if packed and slot.name != "vision" and not slot.backend.supports_packing:
            yield error(
                "data.packing",
                f"documents are packed, but attention.{slot.name} = {slot.backend!r} has supports_packing = "
                "False,\n     so a token could attend to another document.",
                f'recipe.with_data(data.unpack()), or .with_attention({slot.name}="auto").',
            )


def backend_can(draft: Draft) -> Iterator[Finding]:
    """A backend that is named is used, or refused; it is never replaced."""
    for slot in draft.slots:
        place, backend = f"attention.{slot.name}", slot.backend
        if backend.needs_half_precision and draft.compute_dtype == "float32":
            yield error(
                place, f"{backend.name} computes in 16 bits only, the model in float32", 'dtype="bfloat16"'
            )
        availability = backend.availability(draft.machine)
        if not availability.usable:
            yield blocked(place, f"{backend.name} is not available: {availability.reason}", availability.remedy)
        # Where it is not available, it would refuse the very device; another machine has other problems.
        elif (refusal := backend.refuses(slot.problem)) is not None:
            yield error(place, f"{backend.name} cannot: {refusal}", f'.with_attention({slot.name}="auto")')


def backend_chosen(draft: Draft) -> Iterator[Finding]:
    """Say what "auto" chose, and what it passed over."""
    for slot in draft.slots:
        if slot.automatic:
            passed = f"; passed over: {', '.join(slot.choice.passed_over)}" if slot.choice.passed_over else ""
            yield note(f"attention.{slot.name}", f'"auto" chose {slot.backend.name}{passed}')


def backend_differs(draft: Draft) -> Iterator[Finding]:
    """Say where nothing can prove the numbers of a backend."""
    for slot in draft.slots:
        if not slot.backend.exact:
            yield note(
                f"attention.{slot.name}",
                f"{slot.backend!r} means to compute something of its own (exact = False): "
                "isolation is verified, its numbers are not",
            )


def backend_from_network(draft: Draft) -> Iterator[Finding]:
    """Name all code that a run fetches."""
    for slot in draft.slots:
        if slot.backend.remote_code is not None:
            yield note(f"attention.{slot.name}", f"runs code from the hub: {slot.backend.remote_code}")
