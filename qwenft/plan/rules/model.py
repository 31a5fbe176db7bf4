"""What is asked of the checkpoint, and what of it is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenft.family.inventory import inventory
from qwenft.family.roles import default_adapter_roles, roles_of
from qwenft.plan.coverage import coverage, matches, trained_roles, trained_weights
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


def roles_exist(draft: Draft) -> Iterator[Finding]:
    """Every role that is named must be in this model."""
    present = roles_of(draft.architecture)
    kind = "mixture of experts" if draft.architecture.is_moe else "dense"
    ranked = tuple(role for role, _ in draft.adapter.ranks)
    for method, roles in (("on", draft.adapter.roles), ("freeze", draft.adapter.frozen), ("with_rank", ranked)):
        for role in roles:
            if role in present:
                continue
            if role == "mtp" and draft.checkpoint.has_mtp:
                yield error(f"adapter.{method}", '"mtp" is not loaded', "AdapterSpec.full().train_mtp()")
            elif role in roles_of(draft.checkpoint):
                yield error(f"adapter.{method}", f'"{role}" is not loaded', "recipe.with_model(vision=True)")
            elif role == "lm_head":
                yield error(
                    f"adapter.{method}",
                    f'{draft.checkpoint.name} has no "lm_head" of its own: it is tied to the embeddings',
                    "leave it out",
                )
            else:
                yield error(
                    f"adapter.{method}",
                    f'"{role}" does not exist in {draft.checkpoint.name} ({kind}). '
                    f"Roles here: {', '.join(present)}",
                    f".on({', '.join(map(repr, default_adapter_roles(draft.architecture)))})",
                )


def adapter_fields(draft: Draft) -> Iterator[Finding]:
    """No field of the adapter may be without effect."""
    adapter = draft.adapter
    if adapter.kind == "lora" and adapter.frozen:
        yield error("adapter.freeze", "LoRA freezes every weight of the model already", "leave .freeze out")
    if adapter.kind == "full":
        if adapter.target_modules or adapter.target_parameters:
            yield error("adapter.with_target_modules", "full fine-tuning has no targets", ".on(*roles)")
        if adapter.ranks:
            yield error("adapter.with_rank", "full fine-tuning has no rank", "AdapterSpec.lora()")
        return
    trained = {entry.weight.role for entry in trained_weights(draft.architecture, adapter)}
    for role, _ in adapter.ranks:
        if role in roles_of(draft.architecture) and role not in trained:
            yield error("adapter.with_rank", f'"{role}" has a rank but is not adapted', f'.on(..., "{role}")')


def targets_match(draft: Draft) -> Iterator[Finding]:
    """Something is trained, by every role and suffix that is named."""
    adapter, weights = draft.adapter, inventory(draft.architecture)
    for suffix in adapter.target_modules if adapter.kind == "lora" else ():
        names = [n for w in weights if w.lora_target == "module" for n in w.module_names()]
        if not any(matches(suffix, name) for name in names):
            yield error("adapter.with_target_modules", f"{suffix!r} matches no module", '"self_attn.q_proj"')
    for suffix in adapter.target_parameters if adapter.kind == "lora" else ():
        names = [n for w in weights if w.lora_target == "parameter" for n in w.names()]
        if not any(matches(suffix, name) for name in names):
            yield error("adapter.with_target_parameters", f"{suffix!r} matches no parameter", '"mlp.gate.weight"')
    for row in coverage(draft.architecture, adapter) if adapter.kind == "lora" else ():
        if row.role in adapter.roles and row.parameters == 0:
            yield error(
                "adapter.on", f'LoRA reaches nothing in "{row.role}"', f'AdapterSpec.full().on("{row.role}")'
            )
    if not trained_weights(draft.architecture, adapter):
        yield error("adapter", "nothing is trained", "AdapterSpec.lora()")


def multi_token_prediction(draft: Draft) -> Iterator[Finding]:
    """Train the layer that predicts the token after next where there is one, with a loss that knows of it."""
    adapter, loss, place = draft.adapter, draft.training.chosen_loss, "adapter.train_mtp"
    if not adapter.mtp_weight:
        return
    if adapter.kind == "lora":
        yield error(place, 'the weights of "mtp" are trained themselves', "AdapterSpec.full().train_mtp()")
    elif not draft.checkpoint.has_mtp:
        problem = f"{draft.checkpoint.name} has not the one multi-token-prediction layer of the family"
        yield error(place, problem, "leave .train_mtp out")
    elif "mtp" not in trained_roles(draft.architecture, adapter):
        left_out = "freeze" if "mtp" in adapter.frozen else "on"
        yield error(place, f'.{left_out} leaves "mtp" out', '.on(..., "mtp"), or no .train_mtp')
    if not isinstance(loss, str):
        yield error(
            place,
            f'{loss.__name__}() is given what the model\'s own head is given, and nothing of "mtp"',
            'loss="chunked", or no .train_mtp',
        )


def lora_limits(draft: Draft) -> Iterator[Finding]:
    """What peft's LoRA cannot do."""
    adapter = draft.adapter
    if adapter.kind != "lora":
        return
    trained = trained_weights(draft.architecture, adapter)
    bare = sorted({entry.weight.role for entry in trained if entry.weight.lora_target == "parameter"})
    for option, asked, without in (("dropout", adapter.dropout > 0, "0.0"), ("dora", adapter.dora, "False")):
        if asked and bare:
            yield error(
                f"adapter.{option}",
                f"peft has no {option} on bare parameters, and {', '.join(bare)} holds such",
                f"AdapterSpec.lora({option}={without})",
            )
    if draft.architecture.tied and any(entry.weight.role == "embeddings" for entry in trained):
        yield error(
            "adapter.on",
            f'LoRA on the "embeddings" of {draft.checkpoint.name} would leave its tied head behind',
            'AdapterSpec.full().on("embeddings")',
        )


def not_trained(draft: Draft) -> Iterator[Finding]:
    """Name what an adapter does not reach."""
    if draft.adapter.kind == "lora":
        left = [row.role for row in coverage(draft.architecture, draft.adapter) if row.parameters == 0]
        if left:
            yield note("adapter", f"not adapted: {', '.join(left)}")
