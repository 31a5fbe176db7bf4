"""Which weights of a model are trained, and how many parameters that makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import attrs

from qwenft.display import html_table, text_table
from qwenft.family.inventory import Weight, inventory
from qwenft.family.parameters import added_sizes, parameter_counts
from qwenft.family.roles import default_adapter_roles, roles_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qwenft.family.architectures import Architecture
    from qwenft.specs.adapter import AdapterSpec

#: The weight itself; a LoRA pair beside it; a copy beside it (peft's modules_to_save); rows beside it, of tokens.
How = Literal["itself", "pair", "copy", "rows"]


@attrs.frozen
class TrainedWeight:
    """A weight that is trained.

    Args:
        weight: which, with the layers where it is trained.
        how: "itself", or what is trained beside it while it stays: a "pair", a "copy", or "rows" of tokens.
        sizes: elements of each tensor that is trained, in one layer.
        rank: of the pair.
        alpha: of the pair.
    """

    weight: Weight
    how: How
    sizes: tuple[int, ...]
    rank: int = 0
    alpha: float = 0.0

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


class Coverage(tuple[CoverageRow, ...]):
    """Of every role what is trained, a row each."""

    __slots__ = ()

    #: What :meth:`rows` tells.
    HEADER = ("role", "modules", "layers", "trained", "of")

    def rows(self) -> list[tuple[str, ...]]:
        """As text."""
        return [
            (
                row.role,
                ", ".join(module.rpartition(".")[2] for module in row.modules) or "frozen",
                str(row.layers or ""),
                f"{row.parameters:,}",
                f"{row.held:,}",
            )
            for row in self
        ]

    def __repr__(self) -> str:
        return text_table(self.HEADER, self.rows(), right=(2, 3, 4))

    def _repr_html_(self) -> str:
        return html_table(self.HEADER, self.rows(), right=(2, 3, 4))


def trained_weights(architecture: Architecture, adapter: AdapterSpec) -> tuple[TrainedWeight, ...]:
    """Every weight that a recipe trains.

    Args:
        architecture: the model as it is loaded: without its tower where only the text half is.
        adapter: what is asked; not one that was loaded, whose files say it.
    """
    weights = [found for weight in inventory(architecture) for found in _within(weight, adapter.layers)]
    if adapter.kind == "full":
        asked = roles_of(architecture) if adapter.roles is None else adapter.roles
        roles = set(asked) - set(adapter.frozen)
        kept = [w for w in weights if w.role in roles and (w.is_norm_or_bias or not adapter.norms_and_biases)]
        return tuple(TrainedWeight(w, "itself", (w.size,)) for w in kept)
    return (
        *(_pair(weight, adapter) for weight in _adapted(weights, architecture, adapter)),
        *(TrainedWeight(w, "copy", (w.size,)) for w in weights if w.role in adapter.copied),
        *(
            TrainedWeight(w, "rows", (len(adapter.tokens) * w.shape[1],))
            for w in (weights if adapter.tokens else ())
            if w.role in ("embeddings", "lm_head")
        ),
    )


def _within(weight: Weight, layers: tuple[int, ...]) -> Iterator[Weight]:
    """A weight in these decoder layers; vision blocks, and what lies outside of layers, are not restricted."""
    if not layers or not weight.layers or weight.half == "vision":
        yield weight
    elif kept := tuple(layer for layer in weight.layers if layer in layers):
        yield attrs.evolve(weight, layers=kept)


def _adapted(weights: Iterable[Weight], architecture: Architecture, adapter: AdapterSpec) -> Iterator[Weight]:
    """What gets a LoRA pair; a weight that is trained in full gets none beside it."""
    asked = default_adapter_roles(architecture) if adapter.roles is None else adapter.roles
    roles = set(asked) - set(adapter.copied)
    for weight in weights:
        if weight.lora_target is not None and (weight.role in roles or _is_named(weight, adapter)):
            yield weight


def _pair(weight: Weight, adapter: AdapterSpec) -> TrainedWeight:
    rank = adapter.rank_of(weight.role)
    sizes = added_sizes(weight, rank, dora=adapter.dora)
    return TrainedWeight(weight, "pair", sizes, rank, adapter.alpha_of(weight.role))


def coverage(architecture: Architecture, trained: tuple[TrainedWeight, ...]) -> Coverage:
    """A row for every role of the model, trained or not."""
    return Coverage(_row(architecture, role, trained) for role in roles_of(architecture))


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
