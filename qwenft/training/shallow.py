"""A model of a few layers that stands for a deep one, of tensors that hold nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.distributed.fsdp import FSDPModule

from qwenft.family.inventory import inventory
from qwenft.models.bind import causal_of
from qwenft.models.load import named_weights
from qwenft.models.lora import unwrapped
from qwenft.models.quantize import empty_scales
from qwenft.training.shards import give_scales as share_scales

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenft.family.architectures import Architecture
    from qwenft.family.inventory import Weight
    from qwenft.plan.coverage import TrainedWeight
    from qwenft.plan.draft import Draft
    from qwenft.plan.storage import Storage

#: The groups of segments that are repeated, forward and backward: of the decoder's layers and the tower's blocks.
AGAIN = {kind: (f"middle {kind}s forward", f"middle {kind}s backward") for kind in ("layer", "block")}


def shallow(draft: Draft) -> tuple[Architecture, dict[str, int]]:
    """A model of three units of its layers, and how often the middle ones stand in the whole model.

    A unit is what repeats: types of layers, and which of them are checkpointed. Where not all units are trained
    alike the model is left as it is, and its middle occurs once.
    """
    shallow = whole = draft.architecture
    repeats = dict.fromkeys((*AGAIN["layer"], *AGAIN["block"]), 1)
    if not _is_uniform(draft):
        return whole, repeats
    every = draft.training.activation_checkpointing or 1
    unit = math.lcm(period(whole.layer_types), every)
    units = whole.layers // unit
    if units > 3 and whole.layers % unit == 0:
        kinds: Any = whole.layer_types[: 3 * unit]
        shallow = attrs.evolve(whole, layers=3 * unit, layer_types=kinds)
        repeats |= dict.fromkeys(AGAIN["layer"], units - 2)
    tower = whole.vision
    if tower is not None and tower.depth // every > 3 and tower.depth % every == 0:
        shallow = attrs.evolve(shallow, vision=attrs.evolve(tower, depth=3 * every))
        repeats |= dict.fromkeys(AGAIN["block"], tower.depth // every - 2)
    return shallow, repeats


def trained_in(shallow: Architecture, draft: Draft) -> tuple[TrainedWeight, ...]:
    """What is trained of a model of fewer layers."""
    depths = {"text": shallow.layers, "vision": 0 if shallow.vision is None else shallow.vision.depth}

    def part(weight: Weight) -> Weight:
        layers = tuple(layer for layer in weight.layers if layer < depths[weight.half])
        return attrs.evolve(weight, layers=layers)

    return tuple(attrs.evolve(entry, weight=part(entry.weight)) for entry in draft.trained)


def period(kinds: Sequence[str]) -> int:
    """After how many layers their types repeat."""
    return next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[:-n] or n == len(kinds))


def _is_uniform(draft: Draft) -> bool:
    """Whether a weight that is trained in one layer is trained in all that have it."""
    layers = {(w.half, w.module, w.parameter): w.layers for w in inventory(draft.architecture)}
    trained = [entry.weight for entry in draft.trained]
    return all(layers[w.half, w.module, w.parameter] == w.layers for w in trained)


def give_memory(model: Any) -> None:
    """Replace every parameter, all on the meta device, by an empty one on the default device; ties stay."""
    replaced: dict[torch.Tensor, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in replaced:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                fake = replaced[parameter] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
                if parameter.grad_dtype != parameter.dtype:
                    fake.grad_dtype = parameter.grad_dtype
            setattr(module, name, replaced[parameter])


def make_scales(model: Any, architecture: Architecture, storage: Storage) -> list[Any]:
    """Put beside every quantized weight what its dense one is made with, and return that."""
    weights, causal = named_weights(architecture), causal_of(model)
    kind = "SCB" if storage.kind == "int8" else "quant_state"
    parameters = {name: parameter for name, parameter in causal.named_parameters() if unwrapped(name) in weights}
    held: dict[str, Any] = {
        name: empty_scales(weights[unwrapped(name)].shape, storage)
        for name in parameters
        if storage.is_quantized(weights[unwrapped(name)], unwrapped(name))
    }
    if isinstance(causal, FSDPModule):
        share_scales(causal, [(name, kind, scales) for name, scales in held.items()])
    else:
        for name, scales in held.items():
            setattr(parameters[name], kind, scales)
    return [tensor for scales in held.values() for tensor in _tensors_of(scales)]


def _tensors_of(held: Any) -> list[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        return [held]
    nested = [] if held.state2 is None else [held.state2.absmax, held.state2.code, held.offset]
    return [held.absmax, held.code, *nested]
