"""Parameter counts by role, of a model and of LoRA on it, and the names by which peft finds what to adapt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from qwenft.errors import SpecError
from qwenft.family.inventory import inventory
from qwenft.family.roles import roles_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qwenft.family.architectures import Architecture
    from qwenft.family.inventory import Weight


@attrs.frozen
class LoraTargets:
    """What LoRA is put on, as suffixes that match nothing else in the vision-language class.

    Args:
        modules: for peft's ``target_modules``, such as "self_attn.q_proj".
        parameters: for peft's ``target_parameters``, such as "mlp.experts.gate_up_proj".
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


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


def adaptable_roles(architecture: Architecture) -> tuple[str, ...]:
    """The roles with something that LoRA can be put on: all that exist but ``norms``."""
    reached = {weight.role for weight in inventory(architecture) if weight.lora_target is not None}
    return tuple(role for role in roles_of(architecture) if role in reached)


def lora_parameters(architecture: Architecture, ranks: Mapping[str, int], *, dora: bool = False) -> dict[str, int]:
    """The parameters that LoRA (arXiv:2106.09685) adds to each role.

    A matrix of ``out`` rows and ``in`` columns gets rank * (in + out); a stack of experts that for each expert;
    the token embedding rank * (vocabulary + hidden size). Weights that LoRA cannot reach (norms, biases,
    convolutions) add nothing.

    Args:
        architecture: the model.
        ranks: role to rank.
        dora: with a magnitude for each output of a module (DoRA, arXiv:2402.09353); peft has none for stacks of
            experts and the router.

    Returns:
        Role to number of parameters, in the order of `qwenft.family.roles.ROLES`.

    Raises:
        SpecError: the model has no such role.
    """
    counts = dict.fromkeys(_known(architecture, ranks), 0)
    for weight in inventory(architecture):
        if weight.role in counts and weight.lora_target is not None:
            counts[weight.role] += weight.instances * added_parameters(weight, ranks[weight.role], dora=dora)
    return counts


def lora_targets(architecture: Architecture, roles: Iterable[str]) -> LoraTargets:
    """Where peft puts LoRA for these roles.

    Args:
        architecture: the model.
        roles: what to adapt.

    Returns:
        Suffixes that include the parent module, so that "mlp.gate_proj" is neither a shared expert's nor the
        tower's, and that hold in ``...ForConditionalGeneration`` and ``...ForCausalLM`` alike.

    Raises:
        SpecError: the model has no such role.
    """
    wanted = _known(architecture, roles)
    reached = [weight for weight in inventory(architecture) if weight.role in wanted]
    return LoraTargets(
        modules=tuple(weight.module_suffix for weight in reached if weight.lora_target == "module"),
        parameters=tuple(
            f"{weight.module_suffix}.{weight.parameter}" for weight in reached if weight.lora_target == "parameter"
        ),
    )


def _known(architecture: Architecture, roles: Iterable[str]) -> tuple[str, ...]:
    """The roles asked for, in the order of `ROLES`, after checking that the model has each."""
    asked = tuple(roles)
    present = roles_of(architecture)
    for role in asked:
        if role not in present:
            kind = "mixture of experts" if architecture.is_moe else "dense"
            msg = f'"{role}" does not exist in {architecture.name} ({kind}). Roles here: {", ".join(present)}'
            raise SpecError(msg, got=role, expected=present)
    return tuple(role for role in present if role in asked)


def added_parameters(weight: Weight, rank: int, *, dora: bool) -> int:
    """The parameters that LoRA adds to one instance of a weight."""
    *stack, rows, columns = weight.shape
    experts = stack[0] if stack else 1
    added = rank * experts * (rows + columns)
    if not dora or weight.lora_target == "parameter":
        return added
    # peft keeps the magnitude of an embedding per hidden unit, its columns, and of a Linear per output, its rows.
    return added + (columns if weight.kind == "embedding" else rows)
