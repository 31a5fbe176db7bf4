"""Module roles: the words by which adapters, learning rates and reports speak of the parts of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenft.family.architectures import Architecture

#: Every role, in the order in which tables list them.
ROLES: tuple[str, ...] = (
    "full_attention",
    "linear_attention",
    "linear_attention_gates",
    "mlp",
    "shared_expert",
    "routed_experts",
    "router",
    "embeddings",
    "lm_head",
    "mtp",
    "vision",
    "vision_merger",
    "norms",
)

_DENSE_ONLY = frozenset({"mlp"})
_EXPERTS_ONLY = frozenset({"shared_expert", "routed_experts", "router"})
_VISION_ONLY = frozenset({"vision", "vision_merger"})


def roles_of(architecture: Architecture) -> tuple[str, ...]:
    """The roles that exist in this model, in the order of `ROLES`.

    A tied model has no ``lm_head`` of its own, a dense one no experts, a text-only checkpoint no vision; ``mtp``
    is there where that layer is loaded.
    """
    absent = set(_DENSE_ONLY if architecture.is_moe else _EXPERTS_ONLY)
    if architecture.is_text_only:
        absent |= _VISION_ONLY
    if architecture.tied:
        absent.add("lm_head")
    if not architecture.loads_mtp:
        absent.add("mtp")
    if not architecture.full_attention_layers:
        absent.add("full_attention")
    if not architecture.linear_attention_layers:
        absent |= {"linear_attention", "linear_attention_gates"}
    return tuple(role for role in ROLES if role not in absent)


def default_adapter_roles(architecture: Architecture) -> tuple[str, ...]:
    """The roles that an adapter reaches unless told otherwise: both attentions, and the MLP that all tokens visit.

    Routed experts are not among them: rank 16 there is 0.9 B parameters at 35B-A3B.
    """
    reached = {"full_attention", "linear_attention", "shared_expert" if architecture.is_moe else "mlp"}
    return tuple(role for role in roles_of(architecture) if role in reached)
