"""Parameter counts by role, and what LoRA adds to a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenft.family.inventory import inventory
from qwenft.family.roles import roles_of

if TYPE_CHECKING:
    from qwenft.family.architectures import Architecture
    from qwenft.family.inventory import Weight


def parameter_counts(architecture: Architecture, *, text_only: bool = False) -> dict[str, int]:
    """The parameters of each role that the model has, in the order of `qwenft.family.roles.ROLES`.

    Args:
        architecture: the model.
        text_only: without the vision tower.

    Returns:
        Role to number of parameters; a tied head counts once, under "embeddings".
    """
    counted = architecture.text_only() if text_only else architecture
    counts = dict.fromkeys(roles_of(counted), 0)
    for weight in inventory(counted):
        counts[weight.role] += weight.count
    return counts


def total_parameters(architecture: Architecture, *, text_only: bool = False) -> int:
    """The parameters of the whole model, without ``mtp.*``."""
    return sum(parameter_counts(architecture, text_only=text_only).values())


def added_parameters(weight: Weight, rank: int, *, dora: bool) -> int:
    """The parameters that LoRA (arXiv:2106.09685) adds to one instance of a weight, as peft builds it.

    A matrix of ``out`` rows and ``in`` columns gets rank * (in + out), a stack of experts that for each, and
    the token embedding rank * (vocabulary + hidden size).

    Args:
        weight: one that LoRA reaches.
        rank: of the pair.
        dora: with a magnitude for each output (DoRA, arXiv:2402.09353); peft has none for experts and the router.
    """
    *stack, rows, columns = weight.shape
    experts = stack[0] if stack else 1
    added = rank * experts * (rows + columns)
    if not dora or weight.lora_target == "parameter":
        return added
    # peft keeps the magnitude of an embedding per hidden unit, its columns, and of a Linear per output, its rows.
    return added + (columns if weight.kind == "embedding" else rows)
