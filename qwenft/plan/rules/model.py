"""What is asked of the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenft.family.inventory import inventory
from qwenft.plan.findings import error, note
from qwenft.plan.storage import NF4_BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwenft.plan.draft import Draft
    from qwenft.plan.findings import Finding


def vision_tower(draft: Draft) -> Iterator[Finding]:
    """Ask for a tower only where there is one."""
    if draft.model.vision and draft.checkpoint.is_text_only:
        yield error("model.vision", f"{draft.checkpoint.name} has no vision tower", ".text_only()")
    if not draft.model.vision and not draft.checkpoint.is_text_only:
        yield note("model.vision", "the vision tower is not loaded; exports keep it as it is")


def precision(draft: Draft) -> Iterator[Finding]:
    """Say where weights are stored in one dtype and multiplied in another."""
    if draft.compute_dtype != draft.model.dtype:
        yield note(
            "model.dtype",
            f"weights are stored in {draft.model.dtype} and computed in {draft.compute_dtype}: "
            f"{draft.machine.name} multiplies no {draft.model.dtype} in hardware",
        )


def quantization(draft: Draft) -> Iterator[Finding]:
    """What is quantized is frozen, is there, and can be."""
    asked, held, place = draft.model.quantization, draft.storage, "model.quantize"
    if held.kind is not None and draft.adapter.kind == "full":
        yield error(
            place,
            f"full fine-tuning trains the weights themselves, and {held.kind} can only be read",
            'AdapterSpec.lora(), or weights of 16 bits with optimizer="adamw_8bit"',
        )
    if asked is None:
        return
    if held.stored and (held.kind, held.double_quant) != (asked.kind, asked.double_quant):
        scales = "with quantized scales" if held.double_quant else "with plain scales"
        problem = f"{draft.checkpoint.name} is held in {held.kind} {scales} already"
        yield error(place, problem, "leave .quantize out")
    if asked.vision and draft.architecture.is_text_only:
        yield error(place, "vision=True quantizes a tower, and none is loaded", "recipe.with_model(vision=True)")
    for weight in inventory(draft.architecture) if held.kind == "nf4" and asked.experts else ():
        size = weight.size // weight.shape[0]
        if weight.kind == "experts" and size % NF4_BLOCK:
            yield error(
                place,
                f"an expert's {weight.parameter} has {size:,} weights, and nf4 takes blocks of {NF4_BLOCK}",
                '.quantize("int8"), or .quantize("nf4", experts=False)',
            )
