"""Several processes: what they can share, and what they cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenft.plan.findings import error, note

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwenft.family.inventory import Weight
    from qwenft.plan.draft import Draft
    from qwenft.plan.findings import Finding


def processes(draft: Draft) -> Iterator[Finding]:
    """What is for one process runs in one, and what is for several says how they are started."""
    kind, ranks = draft.parallel.kind, draft.ranks
    if kind == "single" and ranks > 1:
        yield error(
            "parallel",
            f"{ranks} processes were started, and the recipe is for one: each of them would train it all",
            "recipe.with_parallel(ParallelSpec.fsdp2()), or one process",
        )
    if kind != "single" and ranks == 1:
        yield note(
            "parallel",
            "in one process nothing is shared out; plan.launch(run_dir, processes=2), or torchrun, starts several",
        )


def parallel_fields(draft: Draft) -> Iterator[Finding]:
    """Options of sharding are for what is sharded."""
    spec = draft.parallel
    if spec.kind == "fsdp2":
        return
    for name, asked in (
        ("offload", spec.offload is not None),
        ("reshard_after_forward", not spec.reshard_after_forward),
        ("hybrid", spec.hybrid),
    ):
        if asked:
            yield error(
                f"parallel.{name}", f'"{spec.kind}" shares no weight out', f"ParallelSpec.fsdp2({name}=...)"
            )


def sharded(draft: Draft) -> Iterator[Finding]:
    """What needs a weight, or a gradient, whole in one process."""
    if draft.parallel.kind != "fsdp2" or draft.ranks == 1:
        return
    adapter, instead = draft.adapter, "ParallelSpec.ddp()"
    if adapter.initialization.startswith(("pissa", "olora")):
        yield error(
            "adapter.initialization",
            f'"{adapter.initialization}" takes the first pairs out of whole weights, which no process has',
            f'initialization="kaiming", or {instead}',
        )
    if adapter.dora and any(
        entry.how == "pair" and (entry.weight.kind == "embedding" or _is_quantized(draft, entry.weight))
        for entry in draft.trained
    ):
        yield error(
            "adapter.dora",
            "the lengths of the rows of embeddings and of quantized weights are taken of whole weights",
            f"AdapterSpec.lora(), or {instead}",
        )
    if draft.training.embeddings_on_host:
        yield error(
            "training.embeddings_on_host",
            "embeddings that are shared out are gathered where the model computes",
            'ParallelSpec.fsdp2(offload="cpu"), or embeddings_on_host=False',
        )


def _is_quantized(draft: Draft, weight: Weight) -> bool:
    names = weight.names(text_only=draft.architecture.is_text_only)
    return any(draft.storage.is_quantized(weight, name) for name in names)


def repeated(draft: Draft) -> Iterator[Finding]:
    """DistributedDataParallel hands gradients over when all of a part of them are there."""
    if draft.parallel.kind == "ddp" and draft.training.optimizer_in_backward:
        yield error(
            "training.optimizer_in_backward",
            '"ddp" adds gradients up over the processes behind the moment at which it would step',
            "ParallelSpec.fsdp2(), or optimizer_in_backward=False",
        )
