"""Which parameters are trained, and how."""

from __future__ import annotations

import math
import os
import re
from typing import Any, ClassVar

import attrs

from qwenft.family.roles import ROLES
from qwenft.specs.base import Check, flag, known_roles, number, one_of, spec, text, whole

KINDS = ("lora", "full")
_INITIALIZATION = re.compile(r"kaiming|gaussian|orthogonal|olora|pissa|pissa_niter_\d+")


def _are_roles(value: Any) -> bool:
    return isinstance(value, tuple) and all(role in ROLES for role in value)


def _are_roles_or_none(value: Any) -> bool:
    return value is None or _are_roles(value)


def _is_of_role(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and value[0] in ROLES


def _are_ranks(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        _is_of_role(pair) and type(pair[1]) is int and pair[1] >= 1 for pair in value
    )


def _are_alphas(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        _is_of_role(pair) and type(pair[1]) in (int, float) and 0 < pair[1] < math.inf for pair in value
    )


def _are_indices(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and all(type(index) is int and index >= 0 for index in value)
        and len(value) == len(set(value))
    )


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
        roles: what is adapted or trained; None for the default, and none where empty.
        frozen: roles that full fine-tuning leaves alone.
        ranks: (role, rank) pairs.
        alphas: (role, alpha) pairs.
        initialization: of the pairs: "kaiming" (B is zero), "gaussian", "orthogonal", or out of the weight itself:
            "pissa" (arXiv:2404.02948; "pissa_niter_16" by a faster, approximate decomposition) and "olora"
            (arXiv:2406.01775). These two take the initial pair out of the weight, and are saved as a plain
            adapter of the original weight, of twice the rank.
        layers: decoder layers where something is adapted or trained; empty for all. What lies outside of them,
            such as the vision tower, is not restricted.
        copied: roles that are trained in full beside the pairs (peft's ``modules_to_save``).
        tokens: ids whose rows of the embeddings, and of the output head, are trained beside the pairs.
        norms_and_biases: full fine-tuning of norms and biases alone (BitFit, arXiv:2106.10199).
        path: the folder of an adapter that is trained on, which decides all the rest.
        target_modules: suffixes of further modules to adapt.
        target_parameters: suffixes of further bare parameters to adapt.
        mtp_weight: of the multi-token-prediction layer's loss; at 0 that layer is not loaded, and exports keep it.

    Examples:
        >>> AdapterSpec.lora(rank=8).on("full_attention", "mlp").with_rank(mlp=4).ranks
        (('mlp', 4),)
    """

    #: Arguments of other libraries, each refused with what stands for it.
    RENAMED: ClassVar[dict[str, str]] = {
        "r": "rank=16",
        "lora_alpha": "alpha=32",
        "lora_dropout": "dropout=0.05",
        "use_rslora": "rslora=True",
        "use_dora": "dora=True",
        "init_lora_weights": 'initialization="pissa"',
        "modules_to_save": '.train_fully("lm_head")',
        "layers_to_transform": ".with_layers(16, 17)",
        "trainable_token_indices": ".train_tokens(248_077)",
        "rank_pattern": ".with_rank(mlp=8)",
        "alpha_pattern": ".with_alpha(mlp=16)",
    }

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
    roles: tuple[str, ...] | None = attrs.field(
        default=None,
        kw_only=True,
        validator=Check(_are_roles_or_none, "roles of the family or None", '.on("mlp")'),
    )
    frozen: tuple[str, ...] = attrs.field(
        default=(), kw_only=True, validator=Check(_are_roles, "roles of the family", '.freeze("embeddings")')
    )
    ranks: tuple[tuple[str, int], ...] = attrs.field(
        default=(),
        kw_only=True,
        validator=Check(_are_ranks, "roles with ranks of at least 1", ".with_rank(mlp=8)"),
    )
    alphas: tuple[tuple[str, float], ...] = attrs.field(
        default=(),
        kw_only=True,
        validator=Check(_are_alphas, "roles with alphas above 0", ".with_alpha(mlp=16)"),
    )
    initialization: str = attrs.field(
        default="kaiming",
        kw_only=True,
        validator=Check(
            lambda value: isinstance(value, str) and _INITIALIZATION.fullmatch(value) is not None,
            "one of 'kaiming', 'gaussian', 'orthogonal', 'olora', 'pissa', 'pissa_niter_16'",
            'AdapterSpec.lora(initialization="pissa")',
        ),
    )
    layers: tuple[int, ...] = attrs.field(
        default=(),
        kw_only=True,
        validator=Check(_are_indices, "different indices of layers", ".with_layers(*range(16, 24))"),
    )
    copied: tuple[str, ...] = attrs.field(
        default=(), kw_only=True, validator=Check(_are_roles, "roles of the family", '.train_fully("lm_head")')
    )
    tokens: tuple[int, ...] = attrs.field(
        default=(),
        kw_only=True,
        validator=Check(_are_indices, "different token ids", ".train_tokens(248_077, 248_078)"),
    )
    norms_and_biases: bool = attrs.field(
        default=False, kw_only=True, validator=flag("AdapterSpec.full().only_norms_and_biases()")
    )
    path: str | None = attrs.field(
        default=None, kw_only=True, validator=text('AdapterSpec.load("runs/a/adapter")', optional=True)
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
        *,
        initialization: str = "kaiming",
    ) -> AdapterSpec:
        """Low-rank pairs beside frozen weights; without ``.on``: both attentions and the (shared) MLP."""
        return cls(
            kind="lora",
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            rslora=rslora,
            dora=dora,
            initialization=initialization,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AdapterSpec:
        """The adapter in a folder, of a run or of peft, to be trained on: what it adapts, its files say."""
        return cls(kind="lora", path=os.fspath(path))

    @classmethod
    def full(cls) -> AdapterSpec:
        """Train the weights themselves, those of the frozen roles apart."""
        return cls(kind="full")

    def on(self, *roles: str) -> AdapterSpec:
        """Adapt (or, in full fine-tuning, train) these roles and no others.

        Without any, an adapter reaches what :meth:`with_target_modules` and :meth:`with_target_parameters` name.
        """
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

    def with_alpha(self, **alphas: float) -> AdapterSpec:
        """Give roles alphas of their own: ``.with_alpha(mlp=16)``."""
        known_roles(tuple(alphas), "AdapterSpec.with_alpha")
        return attrs.evolve(self, alphas=tuple(sorted({**dict(self.alphas), **alphas}.items())))

    def with_layers(self, *indices: int) -> AdapterSpec:
        """Adapt, or train, these decoder layers alone: ``.with_layers(*range(16, 24))``."""
        return attrs.evolve(self, layers=_ascending(indices))

    def train_fully(self, *roles: str) -> AdapterSpec:
        """Train these roles in full beside the pairs of the others: ``.train_fully("lm_head", "norms")``."""
        return attrs.evolve(self, copied=known_roles(roles, "AdapterSpec.train_fully"))

    def train_tokens(self, *ids: int) -> AdapterSpec:
        """Train these tokens' rows of the embeddings, and of the output head, beside the pairs.

        An id is what ``tokenizer.convert_tokens_to_ids("<|tool|>")`` gives.
        """
        return attrs.evolve(self, tokens=_ascending(ids))

    def only_norms_and_biases(self) -> AdapterSpec:
        """In full fine-tuning, train of every role its norms and biases alone."""
        return attrs.evolve(self, norms_and_biases=True)

    def with_target_modules(self, *suffixes: str) -> AdapterSpec:
        """Adapt modules whose names end so, beside those of the roles."""
        return attrs.evolve(self, target_modules=suffixes)

    def with_target_parameters(self, *suffixes: str) -> AdapterSpec:
        """Adapt bare parameters (expert stacks, the router) whose names end so, beside those of the roles."""
        return attrs.evolve(self, target_parameters=suffixes)

    def rank_of(self, role: str) -> int:
        """The rank of a role's pairs."""
        return dict(self.ranks).get(role, self.rank)

    def alpha_of(self, role: str) -> float:
        """The alpha of a role's pairs."""
        return dict(self.alphas).get(role, self.alpha)


def _ascending(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Whole numbers in order and once each; anything else is left for the validator."""
    return tuple(sorted(set(values))) if all(type(value) is int for value in values) else values
