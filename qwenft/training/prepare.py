"""A checkpoint folder made into a model that is ready to train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qwenft.models.bind import bind, causal_of
from qwenft.models.elementwise import fuse_elementwise
from qwenft.models.load import WeightSource, load_model, model_on_meta
from qwenft.models.lora import add_lora, lora_config, put_adapter, require_reached
from qwenft.models.precision import compute_in
from qwenft.plan.records import accumulates
from qwenft.training.shards import repeat_model, shard_model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from qwenft.family.architectures import Architecture
    from qwenft.models.adapter import Adapter
    from qwenft.plan.coverage import TrainedWeight
    from qwenft.plan.storage import Storage
    from qwenft.specs.adapter import AdapterSpec
    from qwenft.specs.parallel import ParallelSpec
    from qwenft.specs.training import TrainingSpec
    from qwenft.training.ranks import Ranks


def prepare_model(
    folder: Path,
    loaded: Architecture,
    *,
    adapter: AdapterSpec,
    trained: tuple[TrainedWeight, ...],
    begun: Adapter | None,
    training: TrainingSpec,
    backends: Mapping[str, Any],
    storage: Storage,
    compute_dtype: str,
    device: str,
    source: str,
    parallel: ParallelSpec,
    ranks: Ranks,
) -> Any:
    """Load, bind, give a model its adapter or its trained weights, and share it out, in this order.

    Args:
        folder: the checkpoint.
        loaded: the part of its architecture to load.
        adapter: the options of what is trained.
        trained: what is trained.
        begun: an adapter that is trained on.
        training: where and how weights and their gradients are held, and the seed of the adapter's initial values.
        backends: of the attention slots, by name.
        storage: how frozen weights are held.
        compute_dtype: in which the layers compute.
        device: "cpu" or "cuda".
        source: the checkpoint's name in the adapter's files.
        parallel: what the processes share.
        ranks: the processes.
    """
    is_sharded = parallel.kind == "fsdp2" and ranks.count > 1
    if is_sharded:
        weights = WeightSource.of_folder(folder, loaded, storage)
        model = model_on_meta(loaded, storage, folder, device=device)
    else:
        model = load_model(
            folder, loaded, storage=storage, device=device, embeddings_on_host=training.embeddings_on_host
        )
    model = adapted(
        model,
        loaded,
        adapter=adapter,
        trained=trained,
        training=training,
        backends=backends,
        compute_dtype=compute_dtype,
        source=source,
    )
    if begun is not None:
        put_adapter(model, begun, loaded)
    if is_sharded:
        shard_model(model, parallel, ranks, weights, device)
    elif ranks.count > 1:
        repeat_model(model)
    return model


def adapted(
    model: Any,
    loaded: Architecture,
    *,
    adapter: AdapterSpec,
    trained: tuple[TrainedWeight, ...],
    training: TrainingSpec,
    backends: Mapping[str, Any],
    compute_dtype: str,
    source: str,
    on_meta: bool = False,
) -> Any:
    """A model, as it is loaded, bound, with its adapter or its trained weights, and checkpointed.

    Args are those of :func:`prepare_model`; ``on_meta`` leaves the adapter on the meta device.
    """
    bind(model, **backends)
    fuse_elementwise(model)
    compute_in(model, compute_dtype)
    if adapter.kind == "lora":
        config = lora_config(loaded, adapter, trained, source)
        model = add_lora(model, config, seed=training.seed, on_meta=on_meta)
        require_reached(model, trained)
    else:
        _train_weights(model, loaded, trained, training)
    checkpoint_activations(model, training)
    return model


def checkpoint_activations(model: Any, training: TrainingSpec) -> None:
    """Have as many layers as the recipe says make their activations again in backward."""
    if training.activation_checkpointing:
        causal_of(model).activation_checkpointing_enable(
            {"use_reentrant": False},
            every_n_layers=training.activation_checkpointing,
            offload=training.activation_offloading,
        )


def _train_weights(
    model: Any, loaded: Architecture, trained: tuple[TrainedWeight, ...], training: TrainingSpec
) -> None:
    """Freeze all but some weights, which are trained themselves."""
    names = {name for entry in trained for name in entry.weight.names(text_only=loaded.is_text_only)}
    for name, parameter in causal_of(model).named_parameters():
        parameter.requires_grad_(name in names)
        if name in names and training.master_weights:
            parameter.data = parameter.data.float()
        if name not in names:
            continue
        # Sums of bfloat16 gradients would lose what later micro-batches add. That of the head comes in float32, of
        # which a copy in bfloat16 is nothing gained where it is used up at once.
        if accumulates(training) or (training.optimizer_in_backward and name == "lm_head.weight"):
            parameter.grad_dtype = torch.float32
