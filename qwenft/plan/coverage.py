"""Which weights of a model are trained, and how many parameters that makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from qwenft.family.inventory import Weight, inventory
from qwenft.family.parameters import added_sizes, parameter_counts
from qwenft.family.roles import default_adapter_roles, roles_of

if TYPE_CHECKING:
    from qwenft.family.architectures import Architecture
    from qwenft.specs.adapter import AdapterSpec


@attrs.frozen
class TrainedWeight:
    """A weight that is trained.

    Args:
        weight: which.
        rank: of the LoRA pair beside it; None where the weight itself is trained.
        sizes: elements of each tensor that is trained, in one layer.
    """

    weight: Weight
    rank: int | None
    sizes: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Trained, over all its layers."""
        return self.weight.instances * sum(self.sizes)


@attrs.frozen
class CoverageRow:
    """What is trained of one role.

    Args:
        role: the role.
        modules: names of its trained modules, as suffixes.
        layers: in how many layers (0 for a role outside them).
        parameters: trained.
        held: parameters that the role holds in all.
    """

    role: str
    modules: tuple[str, ...]
    layers: int
    parameters: int
    held: int


def trained_roles(architecture: Architecture, adapter: AdapterSpec) -> tuple[str, ...]:
    """The roles that are adapted, or trained in full, in the family's order."""
    if adapter.kind == "lora":
        return adapter.roles or default_adapter_roles(architecture)
    return tuple(role for role in adapter.roles or roles_of(architecture) if role not in adapter.frozen)


def trained_weights(architecture: Architecture, adapter: AdapterSpec) -> tuple[TrainedWeight, ...]:
    """Every weight that a recipe trains.

    Args:
        architecture: the model as it is loaded: without its tower where only the text half is.
        adapter: what is asked.
    """
    roles = trained_roles(architecture, adapter)
    weights = inventory(architecture)
    if adapter.kind == "full":
        return tuple(TrainedWeight(w, None, (w.size,)) for w in weights if w.role in roles)
    trained = []
    for weight in weights:
        if weight.lora_target is not None and (weight.role in roles or _is_named(weight, adapter)):
            rank = adapter.rank_of(weight.role)
            trained.append(TrainedWeight(weight, rank, added_sizes(weight, rank, dora=adapter.dora)))
    return tuple(trained)


def coverage(architecture: Architecture, adapter: AdapterSpec) -> tuple[CoverageRow, ...]:
    """A row for every role of the model, trained or not."""
    trained = trained_weights(architecture, adapter)
    return tuple(_row(architecture, role, trained) for role in roles_of(architecture))


def matches(suffix: str, name: str) -> bool:
    """Whether a full name ends in a suffix, at a dot: how peft reads its targets."""
    return name == suffix or name.endswith(f".{suffix}")


def _is_named(weight: Weight, adapter: AdapterSpec) -> bool:
    if weight.lora_target == "module":
        return any(matches(suffix, name) for suffix in adapter.target_modules for name in weight.module_names())
    return any(matches(suffix, name) for suffix in adapter.target_parameters for name in weight.names())


def _row(architecture: Architecture, role: str, trained: tuple[TrainedWeight, ...]) -> CoverageRow:
    of_role = [entry for entry in trained if entry.weight.role == role]
    layers = {layer for entry in of_role for layer in entry.weight.layers}
    return CoverageRow(
        role=role,
        modules=tuple(dict.fromkeys(entry.weight.module_suffix for entry in of_role)),
        layers=len(layers),
        parameters=sum(entry.parameters for entry in of_role),
        held=parameter_counts(architecture)[role],
    )
