"""A model shared out over processes by PyTorch's ``fully_shard``, or repeated in each of them.

The order is fixed: adapters and checkpointing come before, and sharding is last. Weights are on the meta device
until they are shared out; each process then reads its own rows of every one, so that none ever holds the model.
What is quantized is read whole, tensor by tensor, and quantized as one process does it; its scales stay whole.

Small weights that stay in float32 in a model of bfloat16 (``A_log``, ``dt_bias``, the norm of Gated DeltaNet) are
whole in every process: ``fully_shard`` reduces gradients of one dtype at a time.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel

from qwenft.models.bind import causal_of, decoder_of
from qwenft.models.lora import unwrapped
from qwenft.training.trained import SCALES, local_of, rows_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch.distributed.device_mesh import DeviceMesh

    from qwenft.family.inventory import Weight
    from qwenft.models.load import WeightSource
    from qwenft.plan.storage import Storage
    from qwenft.specs.parallel import ParallelSpec
    from qwenft.training.ranks import Ranks

_CALL = "qwenft_call"


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def within(module: Any, function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns that is called within a module's forward, where its weights are whole."""
    return getattr(module, _CALL, _call)(function, *args)


def repeat_model(model: Any) -> None:
    """Have every process hold the model; ``within`` averages the gradients of all (DistributedDataParallel)."""
    causal = causal_of(model)
    repeated = DistributedDataParallel(_Within(causal), broadcast_buffers=False, init_sync=False)
    # Not the module itself: the model would become a part of its own.
    setattr(causal, _CALL, partial(repeated))


class _Within(torch.nn.Module):
    """A module whose forward calls a function."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def shard_model(model: Any, parallel: ParallelSpec, ranks: Ranks, source: WeightSource, device: str) -> None:
    """Share a model out over processes and read each one's part, in place.

    Args:
        model: bound, adapted, with the weights of its checkpoint on the meta device.
        parallel: of kind "fsdp2".
        ranks: the processes.
        source: of the weights.
        device: "cpu" or "cuda".
    """
    share_out(model, parallel, mesh_of(parallel, ranks, device), source.weights, source.storage)
    _read(causal_of(model), source, device, held_on="cpu" if parallel.offload else device)


def mesh_of(parallel: ParallelSpec, ranks: Ranks, device: str) -> DeviceMesh:
    """The processes as ``fully_shard`` wants them: in one row, or a row for each node."""
    mesh = {"shard": ranks.count}
    if parallel.hybrid:
        mesh = {"replicate": ranks.count // ranks.local_count, "shard": ranks.local_count}
    return init_device_mesh(device, tuple(mesh.values()), mesh_dim_names=tuple(mesh))


def share_out(
    model: Any, parallel: ParallelSpec, mesh: DeviceMesh, weights: Mapping[str, Weight], storage: Storage
) -> None:
    """Leave of every weight this process's part, in place.

    Units that are gathered as one are the decoder layers, the blocks of the tower, what the tower has beside them,
    the embeddings and the head, and what is left. Gradients are added up over all processes in float32.

    Args:
        model: bound and adapted.
        parallel: of kind "fsdp2".
        mesh: of the processes.
        weights: of its checkpoint, by name.
        storage: how they are held.
    """
    causal = causal_of(model)
    whole = _whole(causal, weights, storage)
    pinned = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": parallel.reshard_after_forward,
        # Modules cast weights themselves.
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": pinned if parallel.offload else OffloadPolicy(),
        "ignored_params": set(whole.values()),
    }
    for unit in (*_units(causal), causal):
        fully_shard(unit, **options)
    for module in causal.modules():
        if isinstance(module, FSDPModule):
            # Sums, not means: a step divides by the tokens of all processes.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_reduce_scatter_unused_params(True)
    for module in (causal, causal.lm_head):
        setattr(module, _CALL, _call)
        register_fsdp_forward_method(module, _CALL)


def _units(causal: Any) -> Iterator[Any]:
    decoder = decoder_of(causal)
    tower = getattr(causal.model, "visual", None)
    if tower is not None:
        yield from tower.blocks
        yield tower
    yield from decoder.layers
    if hasattr(causal, "mtp"):
        yield causal.mtp
    if not causal.config.get_text_config().tie_word_embeddings:
        yield decoder.embed_tokens
        yield causal.lm_head


def _whole(causal: Any, weights: Mapping[str, Weight], storage: Storage) -> dict[str, torch.nn.Parameter]:
    """The weights that are not shared out, by name."""
    if storage.dtype == "float32":
        return {}
    parameters = dict(causal.named_parameters())
    return {
        name: parameter
        for name, parameter in parameters.items()
        if (weight := weights.get(unwrapped(name))) is not None and weight.is_float32
    }


@torch.no_grad()
def _read(causal: Any, source: WeightSource, device: str, *, held_on: str) -> None:
    """Give every parameter that is on the meta device this process's part of what the files hold.

    Weights are quantized on ``device``, where they are gathered, and parts ``held_on`` it or the host.
    """
    wanted = [name for name, parameter in causal.named_parameters() if parameter.is_meta]
    causal._apply(  # noqa: SLF001 - to_empty would empty the adapters too
        lambda tensor: torch.empty_like(tensor, device=held_on) if tensor.is_meta else tensor
    )
    parameters = dict(causal.named_parameters())
    scales: list[tuple[str, str, Any]] = []
    for name in wanted:
        parameter, key = parameters[name], unwrapped(name)
        rows = rows_of(parameter)
        if key in source.weights and source.storage.is_quantized(source.weights[key], key):
            held: Any = source.read(key, device)
            kind = "SCB" if getattr(held, "quant_state", None) is None else "quant_state"
            scales.append((name, kind, getattr(held, kind)))
            part = held.data[rows]
        elif key in source.weights:
            part = source.rows(key, rows, "cpu")
        else:
            part = _initial(causal, name, source)[rows]
        local_of(parameter).copy_(part)
    give_scales(causal, scales)


def _initial(causal: Any, name: str, source: WeightSource) -> torch.Tensor:
    """What peft makes of a weight as it begins: the lengths of its rows for DoRA, or the rows of some tokens."""
    module, of_dora, _ = unwrapped(name).partition(".lora_magnitude_vector.")
    if of_dora:
        weight = source.read(f"{module}.weight", "cpu")
        return torch.linalg.norm(weight, dim=1).to(weight.dtype)
    layer = causal.get_submodule(name.rpartition(".trainable_tokens_delta")[0])
    head, embeddings = "lm_head.weight", next(key for key in source.weights if key.endswith("embed_tokens.weight"))
    ids = layer.token_indices["default"]
    key = head if name.startswith("lm_head.") and head in source.weights else embeddings
    rows = [source.rows(key, slice(token, token + 1), "cpu") for token in ids]
    return torch.cat(rows)


def give_scales(causal: Any, scales: list[tuple[str, str, Any]]) -> None:
    """Put the scales of quantized weights beside these whenever they have been gathered.

    Args:
        causal: a model that is shared out.
        scales: of each weight its name, what bitsandbytes calls its scales, and the scales.
    """
    setattr(causal, SCALES, scales)
    for unit in (module for module in causal.modules() if isinstance(module, FSDPModule)):
        _give_scales(causal, unit, scales)


def _give_scales(causal: Any, unit: Any, scales: list[tuple[str, str, Any]]) -> None:
    others: list[Any] = [m for m in unit.modules() if isinstance(m, FSDPModule) and m is not unit]
    inside = set(unit.modules()).difference(*(module.modules() for module in others))
    mine = [
        (module, attribute, kind, held)
        for name, kind, held in scales
        for path, _, attribute in [name.rpartition(".")]
        if (module := causal.get_submodule(path)) in inside
    ]

    def give(*_: Any) -> None:
        for module, attribute, kind, held in mine:
            setattr(getattr(module, attribute), kind, held)

    if mine:
        unit.register_forward_pre_hook(give)  # behind that which gathers
