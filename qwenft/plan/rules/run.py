"""Data, and what a run needs beside a right recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwenft.plan.findings import blocked, error, note
from qwenft.specs.codec import cannot_be_saved
from qwenft.specs.data import DataSpec
from qwenft.specs.rows import IteratedRows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwenft.errors import SpecError
    from qwenft.plan.draft import Draft
    from qwenft.plan.findings import Finding


def lengths_fit(draft: Draft) -> Iterator[Finding]:
    """Documents fit the model, rows hold documents, steps hold rows."""
    data = draft.data
    if data is None:
        return
    if data.max_length > draft.architecture.context:
        yield error(
            "data.max_length",
            f"{data.max_length:,} tokens are more than the {draft.architecture.context:,} that the model reads",
            f".with_max_length({draft.architecture.context})",
        )
    if data.row_tokens is not None and not data.packed:
        yield error("data.row_tokens", "rows have a capacity but are not packed", f".pack({data.row_tokens})")
    if data.capacity < data.max_length:
        yield error(
            "data.row_tokens",
            f"a row of {data.capacity:,} tokens cannot hold a document of max_length = {data.max_length:,}",
            f".pack(row_tokens={data.max_length})",
        )
    if draft.training.tokens_per_step is not None and draft.training.tokens_per_step < data.capacity:
        yield error(
            "training.tokens_per_step",
            f"a step of {draft.training.tokens_per_step:,} tokens cannot hold a row of {data.capacity:,}",
            f"tokens_per_step={data.capacity}, or .with_max_length({draft.training.tokens_per_step})",
        )


def streaming(draft: Draft) -> Iterator[Finding]:
    """What is read while training goes on has no end that is known, and nothing can be picked out of it."""
    data = draft.data
    if data is None:
        return
    parts = [("data.source", data), *((f"data.mixed[{n}]", other) for n, (other, _) in enumerate(data.mixed))]
    if isinstance(data.held_out, DataSpec):
        parts.append(("data.held_out", data.held_out))
        if data.held_out.window is not None:
            yield error("data.held_out", "is streamed, and evaluation reads all of it", "data without .stream()")
    for place, part in parts:
        if isinstance(part.source, IteratedRows) and data.window is None:
            fix = ".stream()" if part is data else "files, or a datasets.Dataset"
            yield error(place, f"{part.source} can only be gone through, not read before training", fix)
    if data.window is None:
        return
    if draft.training.max_steps is None:
        yield error(
            "training.max_steps",
            "the data are streamed, and how many steps an epoch has is not known before",
            "TrainingSpec(max_steps=1000)",
        )
    if isinstance(data.held_out, float):
        yield error(
            "data.held_out",
            f"a fraction of {data.held_out:g} cannot be picked out of streamed data",
            '.hold_out(DataSpec.messages("held-out.jsonl"))',
        )
    if data.mixed:
        yield error(
            "data.mixed",
            "data cannot be mixed into streamed ones, whose number is not known",
            "datasets.interleave_datasets([...], probabilities=[...]) as their source, or no .stream()",
        )


def data_loss(draft: Draft) -> Iterator[Finding]:
    """Say what happens to long rows, before they are counted."""
    if draft.data is not None and draft.data.overflow != "error":
        verb = {"drop": "left out", "truncate": "cut behind a message", "split": "split"}[draft.data.overflow]
        yield note("data.overflow", f"rows longer than {draft.data.max_length:,} tokens are {verb} and counted")


def unsaved(draft: Draft) -> Iterator[tuple[str, SpecError]]:
    """The places of a recipe that a file cannot hold, and why."""
    named: dict[str, Any] = {f"attention.{slot.name}": slot.backend for slot in draft.slots}
    if not isinstance(draft.training.loss, str):
        named["training.loss"] = draft.training.loss
    if draft.data is not None and isinstance(draft.data.source, IteratedRows):
        named["data.source"] = draft.data.source
    for place, value in named.items():
        if (problem := cannot_be_saved(value)) is not None:
            yield place, problem


def recipe_is_kept(draft: Draft) -> Iterator[Finding]:
    """Say where a run will not hold a recipe that can be loaded."""
    for place, problem in unsaved(draft):
        yield note(place, f"{problem.problem}; the run folder will hold no recipe.json")


def can_run_here(draft: Draft) -> Iterator[Finding]:
    """What a run needs beside a right recipe."""
    if not draft.has_weights:
        yield blocked(
            "model.source",
            f"{draft.model.source!r} names an architecture and no weights",
            f'ModelSpec("{draft.checkpoint.hub_id}") or a checkpoint folder',
        )
    if draft.data is None:
        yield blocked("data", "there is nothing to train on", 'recipe.with_data(DataSpec.messages("chats.jsonl"))')
    if not draft.here:
        yield blocked("machine", f"the plan is for {draft.machine.name}, not for this machine", "recipe.compile()")
