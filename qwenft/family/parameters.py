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
    """The parameters of the whole model, with ``mtp.*`` where that is loaded."""
    return sum(parameter_counts(architecture, text_only=text_only).values())


def added_sizes(weight: Weight, rank: int, *, dora: bool) -> tuple[int, ...]:
    """The elements of each tensor that LoRA (arXiv:2106.09685) adds to a weight in one layer, as peft builds it.

    A matrix of ``out`` rows and ``in`` columns gets two of rank * in and rank * out, a stack of experts those of
    each together, and the token embedding rank * vocabulary and rank * hidden size.

    Args:
        weight: one that LoRA reaches.
        rank: of the pair.
        dora: with a magnitude for each output (DoRA, arXiv:2402.09353); peft has none for experts and the router.
    """
    *stack, rows, columns = weight.shape
    experts = stack[0] if stack else 1
    pair = (rank * experts * rows, rank * experts * columns)
    if not dora or weight.lora_target == "parameter":
        return pair
    # peft keeps the magnitude of an embedding per hidden unit, its columns, and of a Linear per output, its rows.
    return (*pair, columns if weight.kind == "embedding" else rows)
