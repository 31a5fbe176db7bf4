"""Memory levers: each exact, and none without effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenft.capabilities import Backend
from qwenft.plan.findings import blocked, error, note
from qwenft.plan.records import accumulates

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwenft.plan.draft import Draft
    from qwenft.plan.findings import Finding


def has_a_host(draft: Draft) -> Iterator[Finding]:
    """What is kept on the host is kept from a device that has memory of its own."""
    for name in ("activation_offloading", "embeddings_on_host"):
        if getattr(draft.training, name) and draft.machine.device != "cuda":
            yield blocked(
                f"training.{name}", f"{draft.machine.name} computes in host memory already", f"{name}=False"
            )


def activation_offloading(draft: Draft) -> Iterator[Finding]:
    """Offload what checkpointing keeps."""
    if draft.training.activation_offloading and not draft.training.activation_checkpointing:
        yield error(
            "training.activation_offloading",
            "it keeps on the host what checkpointed layers were given, and no layer is checkpointed",
            "activation_checkpointing=True, or activation_offloading=False",
        )


def optimizer_in_backward(draft: Draft) -> Iterator[Finding]:
    """Gradients that never exist together are neither added up nor measured together."""
    training, place = draft.training, "training.optimizer_in_backward"
    if not training.optimizer_in_backward:
        return
    if training.max_grad_norm is not None:
        yield error(
            place,
            f"clipping at {training.max_grad_norm:g} needs the norm of all gradients before the first update",
            "max_grad_norm=None, or optimizer_in_backward=False",
        )
    if accumulates(training):
        yield error(
            place,
            f"a step of {training.tokens_per_step:,} tokens adds up the gradients of several rows",
            "no tokens_per_step: a step is one row then, or optimizer_in_backward=False",
        )
    if training.non_finite == "skip":
        yield error(
            "training.non_finite",
            "a step that has updated parameters in backward cannot be left out",
            'non_finite="stop", or optimizer_in_backward=False',
        )
    yield note(place, "a gradient that is not finite is found when other parameters have been updated already")


def embeddings_on_host(draft: Draft) -> Iterator[Finding]:
    """Embeddings on the host are looked up there and do nothing else."""
    place = "training.embeddings_on_host"
    if not draft.training.embeddings_on_host:
        return
    if draft.architecture.tied:
        yield error(
            place,
            f"the output head of {draft.checkpoint.name} is the same weight, and multiplies on the device",
            "embeddings_on_host=False",
        )
    if any(entry.weight.role == "embeddings" for entry in draft.trained):
        yield error(place, "the embeddings are trained, on the device", '.freeze("embeddings")')


def declares(backend: Backend) -> bool:
    """Whether a backend says what its kernels hold."""
    kind = type(backend)
    return kind.saved_tensors is not Backend.saved_tensors and kind.workspace is not Backend.workspace


def not_followed(draft: Draft) -> tuple[str, ...]:
    """The slots of backends whose part a simulation must leave out: they launch kernels, and declare nothing."""
    return tuple(s.name for s in draft.slots if not s.backend.traceable and not declares(s.backend))
