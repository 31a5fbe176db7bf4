"""What is trained of the model, and whether it can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from qwenft.family.inventory import inventory
from qwenft.family.roles import default_adapter_roles, roles_of
from qwenft.plan.coverage import coverage, matches
from qwenft.plan.findings import error, note
from qwenft.specs.adapter import AdapterSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwenft.plan.draft import Draft
    from qwenft.plan.findings import Finding

#: Methods that name roles, and the fields that keep them.
_NAMED = {
    "on": "roles",
    "freeze": "frozen",
    "with_rank": "ranks",
    "with_alpha": "alphas",
    "train_fully": "copied",
}
_OF_PAIRS = {
    "with_target_modules": "target_modules",
    "with_target_parameters": "target_parameters",
    "with_rank": "ranks",
    "with_alpha": "alphas",
    "train_fully": "copied",
    "train_tokens": "tokens",
}
_OF_WEIGHTS = {"freeze": "frozen", "only_norms_and_biases": "norms_and_biases", "train_mtp": "mtp_weight"}
#: Initial pairs that are made of the weight, and taken out of it.
_TAKEN_OUT = ("pissa", "olora")


def loaded_adapter(draft: Draft) -> Iterator[Finding]:
    """An adapter that is there already is trained as it is."""
    adapter = draft.asked_adapter
    if adapter.path is not None and adapter != AdapterSpec.load(adapter.path):
        changed = [
            field.name
            for field in attrs.fields(AdapterSpec)
            if getattr(adapter, field.name) != getattr(AdapterSpec.load(adapter.path), field.name)
        ]
        yield error(
            "adapter.load",
            f"{', '.join(changed)}: what {adapter.path} adapts, and how, its files say",
            f'AdapterSpec.load("{adapter.path}") alone',
        )


def roles_exist(draft: Draft) -> Iterator[Finding]:
    """Every role that is named must be in this model."""
    present = roles_of(draft.architecture)
    kind = "mixture of experts" if draft.architecture.is_moe else "dense"
    for method, field in _NAMED.items():
        for named in getattr(draft.adapter, field) or ():
            role = named if isinstance(named, str) else named[0]
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
    full = adapter.kind == "full"
    reason, instead = "LoRA freezes every weight of the model already", "AdapterSpec.full()"
    if full:
        reason, instead = "full fine-tuning has no pairs, and nothing beside the weights", "AdapterSpec.lora()"
    for method, field in (_OF_PAIRS if full else _OF_WEIGHTS).items():
        if getattr(adapter, field):
            yield error(f"adapter.{method}", reason, f"{instead}, or leave .{method} out")
    if full:
        return
    present, paired = roles_of(draft.architecture), {e.weight.role for e in draft.trained if e.how == "pair"}
    for method, noun, pairs in (
        ("with_rank", "a rank", adapter.ranks),
        ("with_alpha", "an alpha", adapter.alphas),
    ):
        for role, _ in pairs:
            if role in present and role not in paired:
                yield error(f"adapter.{method}", f'"{role}" has {noun} but is not adapted', f'.on(..., "{role}")')
    for role in adapter.copied:
        if role in (adapter.roles or ()):
            yield error(
                "adapter.train_fully", f'"{role}" is adapted and trained in full', "one of .on and .train_fully"
            )


def layers_exist(draft: Draft) -> Iterator[Finding]:
    """Layers that are named are in this model."""
    beyond = [index for index in draft.adapter.layers if index >= draft.architecture.layers]
    if beyond:
        yield error(
            "adapter.with_layers",
            f"{draft.checkpoint.name} has {draft.architecture.layers} layers, and no layer {beyond[0]}",
            f".with_layers(*range({draft.architecture.layers}))",
        )


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
    for row in coverage(draft.architecture, draft.trained):
        if (
            row.parameters == 0
            and row.role in (*(adapter.roles or ()), *adapter.copied)
            and row.role not in adapter.frozen
        ):
            if adapter.layers or adapter.norms_and_biases:
                where = "in these layers" if adapter.layers else "that is a norm or a bias"
                yield error("adapter.on", f'nothing is trained of "{row.role}" {where}', "leave it out")
            else:
                yield error(
                    "adapter.on",
                    f'LoRA reaches nothing in "{row.role}"',
                    f'.train_fully("{row.role}"), or AdapterSpec.full().on("{row.role}")',
                )
    if not draft.trained:
        yield error("adapter", "nothing is trained", "AdapterSpec.lora()")


def multi_token_prediction(draft: Draft) -> Iterator[Finding]:
    """Train the layer that predicts the token after next where there is one, with a loss that knows of it."""
    adapter, loss, place = draft.adapter, draft.training.chosen_loss, "adapter.train_mtp"
    if not adapter.mtp_weight or adapter.kind == "lora":
        return
    if not draft.checkpoint.has_mtp:
        problem = f"{draft.checkpoint.name} has not the one multi-token-prediction layer of the family"
        yield error(place, problem, "leave .train_mtp out")
    elif all(entry.weight.role != "mtp" for entry in draft.trained):
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
    pairs = [entry for entry in draft.trained if entry.how == "pair"]
    bare = sorted({entry.weight.role for entry in pairs if entry.weight.lora_target == "parameter"})
    for option, asked, without in (("dropout", adapter.dropout > 0, "0.0"), ("dora", adapter.dora, "False")):
        if asked and bare:
            yield error(
                f"adapter.{option}",
                f"peft has no {option} on bare parameters, and {', '.join(bare)} holds such",
                f"AdapterSpec.lora({option}={without})",
            )
    if draft.architecture.tied and any(entry.weight.role == "embeddings" for entry in pairs):
        yield error(
            "adapter.on",
            f'LoRA on the "embeddings" of {draft.checkpoint.name} would leave its tied head behind',
            '.train_fully("embeddings"), or AdapterSpec.full().on("embeddings")',
        )


def initialization(draft: Draft) -> Iterator[Finding]:
    """Which weights initial pairs can be made for."""
    adapter, place = draft.adapter, "adapter.initialization"
    if adapter.kind != "lora" or adapter.initialization in ("kaiming", "gaussian"):
        return
    pairs = [entry for entry in draft.trained if entry.how == "pair"]
    others = sorted({entry.weight.role for entry in pairs if entry.weight.kind != "linear"})
    problem = f'"{adapter.initialization}" is for Linears, and {", ".join(others)} holds others'
    if others:
        yield error(place, problem, f'leave {", ".join(others)} out, or initialization="kaiming"')
    odd = sorted({entry.rank for entry in pairs if entry.rank % 2})
    if adapter.initialization == "orthogonal" and odd:
        yield error(place, f'"orthogonal" pairs have an even rank, not {odd[0]}', f"rank={odd[0] + 1}")
    if adapter.initialization.startswith(_TAKEN_OUT) and draft.storage.kind is not None:
        yield error(
            place,
            f'"{adapter.initialization}" takes the initial pair out of the weights, and {draft.storage.kind} '
            "cannot hold what is left",
            'initialization="kaiming", or weights of 16 bits',
        )


def trained_beside(draft: Draft) -> Iterator[Finding]:
    """What is trained in full beside pairs is a module of its own, and tokens are in the vocabulary."""
    adapter = draft.adapter
    text_only = draft.architecture.is_text_only
    for role in adapter.copied:
        of_role = [weight for weight in inventory(draft.architecture) if weight.role == role]
        if any(weight.module == "linear_attn" for weight in of_role):
            yield error(
                "adapter.train_fully",
                f'"{role}" has parameters without a module of their own, which peft cannot copy',
                f'AdapterSpec.full().on("{role}")',
            )
        elif any(draft.storage.is_quantized(w, name) for w in of_role for name in w.names(text_only=text_only)):
            yield error(
                "adapter.train_fully", f'"{role}" is held in {draft.storage.kind}, and only read', f'.on("{role}")'
            )
    unknown = [token for token in adapter.tokens if token >= draft.architecture.vocabulary]
    if unknown:
        yield error(
            "adapter.train_tokens",
            f"{draft.checkpoint.name} has {draft.architecture.vocabulary:,} tokens, none of the id {unknown[0]}",
            "tokenizer.convert_tokens_to_ids(token)",
        )
    twice = sorted({"embeddings", "lm_head"} & {e.weight.role for e in draft.trained if e.how != "rows"})
    if adapter.kind == "lora" and adapter.tokens and twice:
        yield error(
            "adapter.train_tokens",
            f"{', '.join(twice)}: trained as a whole already, these rows among the others",
            "one of .train_tokens and that",
        )


def not_trained(draft: Draft) -> Iterator[Finding]:
    """Name what an adapter does not reach."""
    if draft.adapter.kind != "lora":
        return
    left = []
    for row in coverage(draft.architecture, draft.trained):
        layers = {n for w in inventory(draft.architecture) if w.role == row.role for n in w.layers}
        if row.parameters == 0:
            left.append(f"{row.role} of {len(layers)} layers" if layers else row.role)
        elif row.layers < len(layers):
            left.append(f"{row.role} of {len(layers) - row.layers} of {len(layers)} layers")
    if left:
        yield note("adapter", f"not adapted: {', '.join(left)}")
