"""Which parameters are trained, and how."""

from __future__ import annotations

from typing import Any

import attrs

from qwenft.family.roles import ROLES
from qwenft.specs.base import Check, flag, known_roles, number, one_of, spec, whole

KINDS = ("lora", "full")


def _are_roles(value: Any) -> bool:
    return isinstance(value, tuple) and all(role in ROLES for role in value)


def _is_ranked_role(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and value[0] in ROLES and type(value[1]) is int


def _are_ranks(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_ranked_role(pair) and pair[1] >= 1 for pair in value)


def _are_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) and name for name in value)


@spec
@attrs.frozen
class AdapterSpec:
    """LoRA (arXiv:2106.09685) on roles of the model, or full fine-tuning.

    Write it with :meth:`lora` or :meth:`full`.

    Args:
        kind: "lora" or "full".
        rank: of every LoRA pair, unless ``ranks`` names its role.
        alpha: the LoRA update is scaled by alpha / rank.
        dropout: of the LoRA input, in training.
        rslora: scale by alpha / sqrt(rank) instead (arXiv:2312.03732).
        dora: train magnitude and direction apart (arXiv:2402.09353).
        roles: what is adapted or trained; empty for the default.
        frozen: roles that full fine-tuning leaves alone.
        ranks: (role, rank) pairs.
        target_modules: suffixes of further modules to adapt.
        target_parameters: suffixes of further bare parameters to adapt.
        mtp_weight: of the multi-token-prediction layer's loss; at 0 that layer is not loaded, and exports keep it.

    Examples:
        >>> AdapterSpec.lora(rank=8).on("full_attention", "mlp").with_rank(mlp=4).ranks
        (('mlp', 4),)
    """

    kind: str = attrs.field(kw_only=True, validator=one_of(KINDS, "AdapterSpec.lora()"))
    rank: int = attrs.field(default=16, kw_only=True, validator=whole("AdapterSpec.lora(rank=16)"))
    alpha: float = attrs.field(
        default=32, kw_only=True, validator=number("AdapterSpec.lora(alpha=32)", above=True)
    )
    dropout: float = attrs.field(
        default=0.0, kw_only=True, validator=number("AdapterSpec.lora(dropout=0.05)", high=1.0)
    )
    rslora: bool = attrs.field(default=False, kw_only=True, validator=flag("AdapterSpec.lora(rslora=True)"))
    dora: bool = attrs.field(default=False, kw_only=True, validator=flag("AdapterSpec.lora(dora=True)"))
    roles: tuple[str, ...] = attrs.field(
        default=(), kw_only=True, validator=Check(_are_roles, "roles of the family", '.on("mlp")')
    )
    frozen: tuple[str, ...] = attrs.field(
        default=(), kw_only=True, validator=Check(_are_roles, "roles of the family", '.freeze("embeddings")')
    )
    ranks: tuple[tuple[str, int], ...] = attrs.field(
        default=(),
        kw_only=True,
        validator=Check(_are_ranks, "roles with ranks of at least 1", ".with_rank(mlp=8)"),
    )
    target_modules: tuple[str, ...] = attrs.field(
        default=(),
        kw_only=True,
        validator=Check(_are_names, "module suffixes", '.with_target_modules("self_attn.q_proj")'),
    )
    target_parameters: tuple[str, ...] = attrs.field(
        default=(),
        kw_only=True,
        validator=Check(_are_names, "parameter suffixes", '.with_target_parameters("mlp.gate.weight")'),
    )
    mtp_weight: float = attrs.field(default=0.0, kw_only=True, validator=number(".train_mtp(weight=0.3)"))

    @classmethod
    def lora(
        cls,
        rank: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
    ) -> AdapterSpec:
        """Low-rank pairs beside frozen weights; without ``.on``: both attentions and the (shared) MLP."""
        return cls(kind="lora", rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, dora=dora)

    @classmethod
    def full(cls) -> AdapterSpec:
        """Train the weights themselves, those of the frozen roles apart."""
        return cls(kind="full")

    def on(self, *roles: str) -> AdapterSpec:
        """Adapt (or, in full fine-tuning, train) these roles and no others."""
        return attrs.evolve(self, roles=known_roles(roles, "AdapterSpec.on"))

    def freeze(self, *roles: str) -> AdapterSpec:
        """Leave these roles as they are in full fine-tuning."""
        return attrs.evolve(self, frozen=known_roles(roles, "AdapterSpec.freeze"))

    def train_mtp(self, weight: float = 0.3) -> AdapterSpec:
        """Train the multi-token-prediction layer too, in full fine-tuning.

        Its loss, of the token after next, is added with this weight (0.3 in DeepSeek-V3, arXiv:2412.19437) to that
        of the model, all of which it reaches. Its role is "mtp": with ``.on("mtp")`` nothing else is trained.
        """
        return attrs.evolve(self, mtp_weight=weight)

    def with_rank(self, **ranks: int) -> AdapterSpec:
        """Give roles ranks of their own: ``.with_rank(routed_experts=4)``."""
        known_roles(tuple(ranks), "AdapterSpec.with_rank")
        return attrs.evolve(self, ranks=tuple(sorted({**dict(self.ranks), **ranks}.items())))

    def with_target_modules(self, *suffixes: str) -> AdapterSpec:
        """Adapt modules whose names end so, beside those of the roles."""
        return attrs.evolve(self, target_modules=suffixes)

    def with_target_parameters(self, *suffixes: str) -> AdapterSpec:
        """Adapt bare parameters (expert stacks, the router) whose names end so, beside those of the roles."""
        return attrs.evolve(self, target_parameters=suffixes)

    def rank_of(self, role: str) -> int:
        """The rank of a role's pairs."""
        return dict(self.ranks).get(role, self.rank)
