"""What can be wrong with a recipe: one small function a rule.

A rule takes a draft and yields findings; it decides nothing and changes nothing. Combinations are checked here
and nowhere else; a field by itself is checked by its spec.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import attrs

from qwenft.family.inventory import inventory
from qwenft.family.roles import default_adapter_roles, roles_of
from qwenft.plan.coverage import coverage, matches, trained_weights
from qwenft.plan.findings import Finding, blocked, error, note
from qwenft.specs.codec import cannot_be_saved
from qwenft.specs.data import DataSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qwenft.plan.draft import Draft


def vision_tower(draft: Draft) -> Iterator[Finding]:
    """Ask for a tower only where there is one."""
    if draft.model.vision and draft.checkpoint.is_text_only:
        yield error("model.vision", f"{draft.checkpoint.name} has no vision tower", ".text_only()")
    if not draft.model.vision and not draft.checkpoint.is_text_only:
        yield note("model.vision", "the vision tower is not loaded; exports keep it as it is")


def vision_attention(draft: Draft) -> Iterator[Finding]:
    """A backend of the tower must have a tower."""
    if draft.attention.vision != "auto" and draft.architecture.is_text_only:
        yield error(
            "attention.vision",
            f"{draft.attention.vision!r} would attend in a tower that is not loaded",
            "recipe.with_model(vision=True), or leave vision out",
        )


def precision(draft: Draft) -> Iterator[Finding]:
    """Say where weights are stored in one dtype and multiplied in another."""
    if draft.compute_dtype != draft.model.dtype:
        yield note(
            "model.dtype",
            f"weights are stored in {draft.model.dtype} and computed in {draft.compute_dtype}: "
            f"{draft.machine.name} multiplies no {draft.model.dtype} in hardware",
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
            if role in roles_of(draft.checkpoint):
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


def recipe_is_kept(draft: Draft) -> Iterator[Finding]:
    """Say where a run will not hold a recipe that can be loaded."""
    named: dict[str, Any] = {f"attention.{slot.name}": slot.backend for slot in draft.slots}
    if not isinstance(draft.training.loss, str):
        named["training.loss"] = draft.training.loss
    for place, value in named.items():
        if (problem := cannot_be_saved(value)) is not None:
            yield note(place, f"{problem.problem}; the run folder will hold no recipe.json")


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


def evaluation(draft: Draft) -> Iterator[Finding]:
    """Evaluate only what was held out, and decide nothing by what is never measured."""
    training = draft.training
    held_out = None if draft.data is None else draft.data.held_out
    if isinstance(held_out, DataSpec) and held_out.held_out is not None:
        yield error("data.held_out", "held-out data hold out some of their own", "leave its .hold_out out")
    if training.patience is not None and training.evaluate_every is None:
        yield error(
            "training.patience", "early stopping needs evaluations on the way", "TrainingSpec(evaluate_every=50)"
        )
    if held_out is not None:
        return
    for field, asked in (("patience", training.patience is not None), ("keep_best", training.keep_best)):
        if asked:
            yield error(f"training.{field}", "there is no held-out data to judge by", "data.hold_out(0.05)")
    if training.evaluate_every is not None and not training.sample_prompts:
        yield error("training.evaluate_every", "there is no held-out data to evaluate", "data.hold_out(0.05)")


def optimizer_fields(draft: Draft) -> Iterator[Finding]:
    """Numbers of an optimizer or a schedule belong to it, and paging needs a GPU to page from."""
    training = draft.training
    fields = attrs.fields(type(training))
    sgd = training.optimizer == "sgd"
    for name, taken in (("momentum", sgd), ("betas", not sgd), ("epsilon", not sgd)):
        if not taken and getattr(training, name) != getattr(fields, name).default:
            other = "adamw" if sgd else "sgd"
            yield error(
                f"training.{name}", f'"{training.optimizer}" has no {name}', f'optimizer="{other}", or no {name}'
            )
    if training.optimizer.startswith("paged") and draft.machine.device != "cuda":
        yield blocked(
            "training.optimizer",
            f'"{training.optimizer}" pages from a CUDA GPU to the host, and {draft.machine.name} has none',
            f'optimizer="{training.optimizer.removeprefix("paged_")}"',
        )


def schedule_fields(draft: Draft) -> Iterator[Finding]:
    """A course of the learning rate that can be followed."""
    training = draft.training
    if training.decay_ratio is not None:
        if training.schedule != "warmup_stable_decay":
            yield error(
                "training.decay_ratio",
                f'"{training.schedule}" has no decay of its own length',
                'schedule="warmup_stable_decay", or no decay_ratio',
            )
        elif training.warmup_ratio + training.decay_ratio > 1:
            yield error(
                "training.decay_ratio",
                f"warmup and decay take {training.warmup_ratio + training.decay_ratio:g} of the steps",
                "smaller warmup_ratio or decay_ratio",
            )
    if training.floor_ratio and training.schedule == "constant":
        yield error("training.floor_ratio", '"constant" never falls to a floor', 'schedule="cosine"')


def learning_rates(draft: Draft) -> Iterator[Finding]:
    """A learning rate is for something that is trained."""
    trained = {entry.weight.role for entry in trained_weights(draft.architecture, draft.adapter)}
    for role, _ in draft.training.learning_rates:
        if role not in trained:
            yield error(
                "training.with_learning_rate", f'"{role}" has a learning rate but is not trained', f'.on("{role}")'
            )
    if draft.training.lora_plus_ratio != 1 and draft.adapter.kind != "lora":
        yield error("training.lora_plus_ratio", "full fine-tuning has no B matrices", "AdapterSpec.lora()")


def loss_fields(draft: Draft) -> Iterator[Finding]:
    """What is added to plain cross entropy is added by a loss that can."""
    loss = draft.training.chosen_loss
    for name in ("z_loss", "label_smoothing"):
        if not getattr(draft.training, name):
            continue
        if not isinstance(loss, str):
            yield error(
                f"training.{name}", f"{loss.__name__}() is not told of it", f"compute it there, or no {name}"
            )
        elif loss == "cce":
            yield error(f"training.{name}", '"cce" has none', f'loss="chunked", or no {name}')


def cut_cross_entropy(draft: Draft) -> Iterator[Finding]:
    """Where cut cross entropy runs, and where it would lose precision."""
    if draft.training.loss != "cce":
        return
    place, instead = "training.loss", 'loss="chunked"'
    heads = {"lm_head", "embeddings"} if draft.architecture.tied else {"lm_head"}
    trained = {entry.weight.role for entry in trained_weights(draft.architecture, draft.adapter)}
    if heads & trained:
        yield error(place, '"cce" adds the gradient of a trained output head up in 16 bits', instead)
    if draft.compute_dtype == "float32":
        yield error(place, '"cce" computes in 16 bits only, the model in float32', instead)
    capability = draft.machine.compute_capability
    if draft.machine.device != "cuda" or (capability is not None and capability < (8, 0)):
        yield blocked(
            place, f'"cce" needs an NVIDIA GPU of compute capability 8.0, not {draft.machine.name}', instead
        )
    elif draft.here and find_spec("cut_cross_entropy") is None:
        yield blocked(place, "cut-cross-entropy is not installed", 'pip install "qwenft[cuda]"')
    yield note(place, '"cce" adds the gradient of the hidden states up in 16 bits, "chunked" in float32')


def trained_precision(draft: Draft) -> Iterator[Finding]:
    """Say how updates reach weights that are stored in 16 bits."""
    full, half = draft.adapter.kind == "full", draft.model.dtype == "bfloat16"
    if draft.training.master_weights and not (full and half):
        reason = "weights are float32 already" if full else "adapters are float32 already"
        yield error("training.master_weights", reason, "leave master_weights out")
    elif full and half and not draft.training.master_weights:
        yield note(
            "training.master_weights",
            "weights are trained in bfloat16, and updates rounded stochastically; "
            "master_weights=True holds them in float32",
        )


def determinism(draft: Draft) -> Iterator[Finding]:
    """Say where two runs differ in their last bits."""
    if draft.machine.device == "cpu":
        return
    if not draft.training.deterministic:
        yield note(
            "training.deterministic",
            "on CUDA some sums are taken in no fixed order, and two runs differ in their last bits; "
            "deterministic=True chooses algorithms that repeat, where there are some",
        )
        return
    for slot in draft.slots:
        if not slot.backend.deterministic:
            yield error(
                f"attention.{slot.name}",
                f"deterministic=True, and {slot.backend!r} promises no equal bits (deterministic = False)",
                f'.with_attention({slot.name}="auto"), or deterministic=False',
            )


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


def data_loss(draft: Draft) -> Iterator[Finding]:
    """Say what happens to long rows, before they are counted."""
    if draft.data is not None and draft.data.overflow != "error":
        verb = "left out" if draft.data.overflow == "drop" else "cut"
        yield note("data.overflow", f"rows longer than {draft.data.max_length:,} tokens are {verb} and counted")


RULES: tuple[Callable[[Draft], Iterator[Finding]], ...] = (
    vision_tower,
    vision_attention,
    precision,
    roles_exist,
    adapter_fields,
    targets_match,
    lora_limits,
    not_trained,
    packing_is_exact,
    backend_can,
    backend_chosen,
    backend_differs,
    backend_from_network,
    recipe_is_kept,
    lengths_fit,
    optimizer_fields,
    schedule_fields,
    learning_rates,
    loss_fields,
    cut_cross_entropy,
    trained_precision,
    determinism,
    evaluation,
    can_run_here,
    data_loss,
)


def check(draft: Draft) -> tuple[Finding, ...]:
    """Everything that the rules find, in their order."""
    return tuple(finding for rule in RULES for finding in rule(draft))
