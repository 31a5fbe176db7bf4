"""The loop's numbers: none without effect."""

from __future__ import annotations

from importlib.util import find_spec
from os import environ
from shutil import which
from typing import TYPE_CHECKING

import attrs

from qwenft.plan.findings import blocked, error, note
from qwenft.specs.data import DataSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwenft.plan.draft import Draft
    from qwenft.plan.findings import Finding


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
    trained = {entry.weight.role for entry in draft.trained}
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


def router_loss(draft: Draft) -> Iterator[Finding]:
    """Balance experts where there are some."""
    if draft.training.router_aux_loss and not draft.architecture.is_moe:
        yield error(
            "training.router_aux_loss",
            f"{draft.checkpoint.name} is dense: it has no router",
            "leave router_aux_loss out",
        )


def cut_cross_entropy(draft: Draft) -> Iterator[Finding]:
    """Where cut cross entropy runs, and where it would lose precision."""
    if draft.training.loss != "cce":
        return
    place, instead = "training.loss", 'loss="chunked"'
    heads = {"lm_head", "embeddings"} if draft.architecture.tied else {"lm_head"}
    trained = {entry.weight.role for entry in draft.trained}
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


def compilation(draft: Draft) -> Iterator[Finding]:
    """Compile where there is a compiler."""
    if not draft.training.compile_elementwise or not draft.here:
        return
    place, instead = "training.compile_elementwise", "compile_elementwise=False"
    if draft.machine.device == "cuda" and find_spec("triton") is None:
        yield blocked(
            place, "torch.compile needs Triton, which is not installed", f"pip install triton, or {instead}"
        )
    elif draft.machine.device == "cpu" and not any(map(which, (environ.get("CXX", "g++"), "clang++"))):
        yield blocked(place, "torch.compile needs a C++ compiler, and none is found", f"install g++, or {instead}")


def determinism(draft: Draft) -> Iterator[Finding]:
    """Say where two runs differ in their last bits."""
    if draft.machine.device == "cpu":
        return
    if not draft.training.deterministic:
        unordered = ["gradients of embeddings"]
        unordered += ["routed experts"] if draft.architecture.is_moe else []
        unordered += [f"kernels of {slot.backend.name}" for slot in draft.slots if not slot.backend.deterministic]
        yield note(
            "training.deterministic",
            f"on CUDA some sums are taken in no fixed order ({', '.join(unordered)}), and two runs differ in "
            "their last bits; deterministic=True chooses algorithms that repeat, where there are some",
        )
        return
    for slot in draft.slots:
        if not slot.backend.deterministic:
            yield error(
                f"attention.{slot.name}",
                f"deterministic=True, and {slot.backend!r} promises no equal bits (deterministic = False)",
                f'.with_attention({slot.name}="auto"), or deterministic=False',
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
