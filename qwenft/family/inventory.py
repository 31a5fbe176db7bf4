"""Every weight of a model by role, name and shape: the one source of all that counts or names parameters.

Names and shapes are those of transformers 5.23 (models/qwen3_5 and models/qwen3_5_moe) in memory, with experts
fused to 3-D stacks. The multi-token-prediction layer, which transformers leaves out, has the names of the
checkpoint's files (``mtp.*``), and is here where the architecture loads it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import attrs

from qwenft.family.architectures import FULL_ATTENTION

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qwenft.family.architectures import Architecture, ExpertShape, VisionShape

Kind = Literal["linear", "experts", "embedding", "parameter"]
Half = Literal["text", "vision"]
Target = Literal["module", "parameter"]

_TEXT_ROOT = "model.language_model."
_TEXT_ROOT_ALONE = "model."
_VISION_ROOT = "model.visual."
_ROUTER = "mlp.gate"
#: What checkpoints hold in float32: rounding it hurts, and transformers keeps no list of its own for this family.
FLOAT32 = ("linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.norm")


@attrs.frozen
class Weight:
    """One parameter, in every layer that has it.

    Args:
        role: one of `qwenft.family.roles.ROLES`.
        module: the module that holds it; inside a layer or vision block relative to that ("self_attn.q_proj"),
            elsewhere the full name in ``...ForConditionalGeneration`` ("model.language_model.norm").
        parameter: its attribute of the module: "weight", "bias", "A_log", "gate_up_proj".
        shape: in one layer.
        kind: "linear" for the weight of an ``nn.Linear``, "experts" for a 3-D stack of experts, "embedding" for
            the token embedding, "parameter" for all else: biases, norms, convolutions, the router, positions.
        layers: indices of the decoder layers, or vision blocks, that have it; empty for a weight outside them.
        half: "text" or "vision".
    """

    role: str
    module: str
    parameter: str
    shape: tuple[int, ...]
    kind: Kind
    layers: tuple[int, ...]
    half: Half

    @property
    def size(self) -> int:
        """Its elements in one layer."""
        return math.prod(self.shape)

    @property
    def instances(self) -> int:
        """How many times the model has it: once for each layer, or once."""
        return len(self.layers) or 1

    @property
    def count(self) -> int:
        """Its elements over all layers."""
        return self.size * self.instances

    @property
    def module_suffix(self) -> str:
        """The end of the module's name that no other module of the model shares.

        It is the same in ``...ForConditionalGeneration`` and ``...ForCausalLM``: "self_attn.q_proj",
        "embed_tokens", "merger.linear_fc1".
        """
        return self.module.removeprefix(_TEXT_ROOT).removeprefix(_VISION_ROOT)

    @property
    def is_float32(self) -> bool:
        """Whether it is float32 in whatever dtype the model is held."""
        return f"{self.module}.{self.parameter}".startswith(FLOAT32)

    @property
    def is_norm_or_bias(self) -> bool:
        """Whether it is a norm or a bias, that of the Gated DeltaNet's time steps among them."""
        return "norm" in self.module.rpartition(".")[2] or self.parameter.endswith("bias")

    @property
    def lora_target(self) -> Target | None:
        """Whether LoRA reaches it through its module, by its parameter's name, or not at all.

        The names are those of peft: ``target_modules`` and ``target_parameters``. Convolutions and positions of
        the tower are left out, though peft has layers for them: nobody adapts these.
        """
        if self.kind in ("linear", "embedding"):
            return "module"
        if self.kind == "experts" or self.module == _ROUTER:
            return "parameter"
        return None

    @property
    def lora_name(self) -> str:
        """The suffix by which peft finds it: of the module, or of the bare parameter."""
        return f"{self.module_suffix}.{self.parameter}" if self.lora_target == "parameter" else self.module_suffix

    @property
    def layer_names(self) -> tuple[str, ...]:
        """`lora_name` in each layer, by which peft finds it there and nowhere else."""
        container = "layers" if self.half == "text" else "blocks"
        return tuple(f"{container}.{layer}.{self.lora_name}" for layer in self.layers)

    def module_names(self, *, text_only: bool = False) -> tuple[str, ...]:
        """The full name of its module in each layer.

        Args:
            text_only: as in ``...ForCausalLM`` ("model.layers.0...") instead of ``...ForConditionalGeneration``
                ("model.language_model.layers.0..."); a weight of the vision half has no name there.

        Returns:
            One name for each of `layers`, or a single one outside layers.
        """
        if text_only and self.half == "vision":
            return ()
        text_root = _TEXT_ROOT_ALONE if text_only else _TEXT_ROOT
        if not self.layers:
            if self.module.startswith(_TEXT_ROOT):
                return (text_root + self.module.removeprefix(_TEXT_ROOT),)
            return (self.module,)
        container = f"{text_root}layers" if self.half == "text" else f"{_VISION_ROOT}blocks"
        return tuple(f"{container}.{layer}.{self.module}" for layer in self.layers)

    def names(self, *, text_only: bool = False) -> tuple[str, ...]:
        """Its full name in each layer, as ``named_parameters()`` gives it; see `module_names`."""
        return tuple(f"{module}.{self.parameter}" for module in self.module_names(text_only=text_only))


def parted(weight: Weight, taken: Iterable[Weight]) -> tuple[Weight | None, Weight | None]:
    """A weight in the layers where it is not among ``taken``, and in those where it is; None for neither."""
    place = (weight.half, weight.module, weight.parameter)
    found = [other for other in taken if (other.half, other.module, other.parameter) == place]
    if not weight.layers:
        return (None, weight) if found else (weight, None)
    layers = {layer for other in found for layer in other.layers}
    left, there = (
        tuple(layer for layer in weight.layers if (layer in layers) is among) for among in (False, True)
    )
    return attrs.evolve(weight, layers=left) if left else None, attrs.evolve(
        weight, layers=there
    ) if there else None


def role_of(architecture: Architecture, parameter: str) -> str:
    """The role of a parameter, or of an adapter's parameter inside the module that it adapts.

    Args:
        architecture: the model as it is loaded.
        parameter: its full name, with the names of adapters behind those of modules.

    Raises:
        KeyError: it lies in no module of the model.
    """
    roles = _roles_by_name(architecture)
    name = parameter
    while name not in roles:
        if not name:
            raise KeyError(parameter)
        name = name.rpartition(".")[0]
    return roles[name]


@lru_cache(maxsize=16)
def _roles_by_name(architecture: Architecture) -> dict[str, str]:
    roles: dict[str, str] = {}
    for weight in inventory(architecture):
        names = weight.names(text_only=architecture.is_text_only)
        roles.update(dict.fromkeys(names, weight.role))
        for module in weight.module_names(text_only=architecture.is_text_only):
            roles.setdefault(module, weight.role)
    return roles


@lru_cache(maxsize=256)
def inventory(architecture: Architecture) -> tuple[Weight, ...]:
    """Every weight of a model, in the order of the forward pass, the vision half last.

    Returns:
        One `Weight` for each kind of parameter, with the layers that have it.
    """
    weights = [
        _outside(
            "embeddings", "model.language_model.embed_tokens", _matrix_of_embedding(architecture), "embedding"
        ),
        # Without this a model that lacks one kind of layer would count its weights once, as if outside layers.
        *(_full_attention(architecture) if architecture.full_attention_layers else ()),
        *(_linear_attention(architecture) if architecture.linear_attention_layers else ()),
        *_feed_forward(architecture),
        *_norms(architecture),
    ]
    if not architecture.tied:
        weights.append(_outside("lm_head", "lm_head", _matrix_of_embedding(architecture), "linear"))
    if architecture.loads_mtp:
        weights.extend(_multi_token_prediction(architecture))
    if architecture.vision is not None:
        weights.extend(_vision(architecture.vision))
    return tuple(weights)


def named_shapes(architecture: Architecture, *, text_only: bool = False) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its full name.

    Args:
        architecture: the model.
        text_only: as ``...ForCausalLM`` holds it; always so for a checkpoint without a vision tower.
    """
    text_only = text_only or architecture.is_text_only
    return {name: weight.shape for weight in inventory(architecture) for name in weight.names(text_only=text_only)}


def _matrix_of_embedding(architecture: Architecture) -> tuple[int, int]:
    return (architecture.vocabulary, architecture.hidden_size)


def _outside(role: str, module: str, shape: tuple[int, ...], kind: Kind, parameter: str = "weight") -> Weight:
    half: Half = "vision" if module.startswith(_VISION_ROOT) else "text"
    return Weight(role, module, parameter, shape, kind, (), half)


def _full_attention(architecture: Architecture) -> Iterator[Weight]:
    hidden = architecture.hidden_size
    head = architecture.head_dim
    query = architecture.query_heads * head
    key = architecture.key_value_heads * head
    # q_proj is twice as wide as its heads: its other half is the output gate.
    linears = {
        "q_proj": (2 * query, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "o_proj": (hidden, query),
    }
    layers = architecture.full_attention_layers
    for name, shape in linears.items():
        yield Weight("full_attention", f"self_attn.{name}", "weight", shape, "linear", layers, "text")
    for name in ("q_norm", "k_norm"):
        yield Weight("full_attention", f"self_attn.{name}", "weight", (head,), "parameter", layers, "text")


def _linear_attention(architecture: Architecture) -> Iterator[Weight]:
    hidden = architecture.hidden_size
    heads = architecture.gdn_value_heads
    key = architecture.gdn_key_heads * architecture.gdn_key_dim
    value = heads * architecture.gdn_value_dim
    channels = 2 * key + value
    layers = architecture.linear_attention_layers
    linears = (
        ("linear_attention", "in_proj_qkv", (channels, hidden)),
        ("linear_attention", "in_proj_z", (value, hidden)),
        ("linear_attention", "out_proj", (hidden, value)),
        ("linear_attention_gates", "in_proj_a", (heads, hidden)),
        ("linear_attention_gates", "in_proj_b", (heads, hidden)),
    )
    for role, name, shape in linears:
        yield Weight(role, f"linear_attn.{name}", "weight", shape, "linear", layers, "text")
    others: tuple[tuple[str, str, tuple[int, ...]], ...] = (
        ("linear_attn.conv1d", "weight", (channels, 1, architecture.conv_kernel)),
        ("linear_attn", "A_log", (heads,)),
        ("linear_attn", "dt_bias", (heads,)),
        ("linear_attn.norm", "weight", (architecture.gdn_value_dim,)),
    )
    for module, parameter, other in others:
        yield Weight("linear_attention", module, parameter, other, "parameter", layers, "text")


def _feed_forward(architecture: Architecture) -> Iterator[Weight]:
    layers = tuple(range(architecture.layers))
    if architecture.experts is not None:
        yield from _experts(architecture.experts, architecture.hidden_size, layers)
    if architecture.intermediate_size is not None:
        yield from _gated_mlp("mlp", "mlp", architecture.hidden_size, architecture.intermediate_size, layers)


def _experts(experts: ExpertShape, hidden: int, layers: tuple[int, ...]) -> Iterator[Weight]:
    width = experts.intermediate_size
    stacks = {"gate_up_proj": (experts.count, 2 * width, hidden), "down_proj": (experts.count, hidden, width)}
    for name, shape in stacks.items():
        yield Weight("routed_experts", "mlp.experts", name, shape, "experts", layers, "text")
    yield from _gated_mlp("shared_expert", "mlp.shared_expert", hidden, experts.shared_intermediate_size, layers)
    # The router is a bare parameter of its own class, not an nn.Linear; the shared expert's gate is one.
    yield Weight("router", _ROUTER, "weight", (experts.count, hidden), "parameter", layers, "text")
    yield Weight("router", "mlp.shared_expert_gate", "weight", (1, hidden), "linear", layers, "text")


def _gated_mlp(role: str, module: str, hidden: int, width: int, layers: tuple[int, ...]) -> Iterator[Weight]:
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    for name, shape in shapes.items():
        yield Weight(role, f"{module}.{name}", "weight", shape, "linear", layers, "text")


def _norms(architecture: Architecture) -> Iterator[Weight]:
    shape = (architecture.hidden_size,)
    layers = tuple(range(architecture.layers))
    for module in ("input_layernorm", "post_attention_layernorm"):
        yield Weight("norms", module, "weight", shape, "parameter", layers, "text")
    yield _outside("norms", "model.language_model.norm", shape, "parameter")


def _multi_token_prediction(architecture: Architecture) -> Iterator[Weight]:
    """What joins a token's embedding to the hidden state before it, a layer of full attention, and a last norm."""
    hidden = architecture.hidden_size
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield _outside("mtp", f"mtp.{name}", (hidden,), "parameter")
    yield _outside("mtp", "mtp.fc", (hidden, 2 * hidden), "linear")
    layer_types: Any = (FULL_ATTENTION,)
    one = attrs.evolve(architecture, layers=1, layer_types=layer_types)
    for weight in (*_full_attention(one), *_feed_forward(one), *_norms(one)):
        if weight.layers:
            yield attrs.evolve(weight, role="mtp", module=f"mtp.layers.0.{weight.module}", layers=())
    yield _outside("mtp", "mtp.norm", (hidden,), "parameter")


def _vision(vision: VisionShape) -> Iterator[Weight]:
    hidden = vision.hidden_size
    patch = (hidden, vision.in_channels, vision.temporal, vision.patch, vision.patch)
    yield _outside("vision", "model.visual.patch_embed.proj", patch, "parameter")
    yield _outside("vision", "model.visual.patch_embed.proj", (hidden,), "parameter", "bias")
    positions = (vision.position_embeddings, hidden)
    yield _outside("vision", "model.visual.pos_embed", positions, "parameter")
    yield from _vision_blocks(vision)
    yield from _vision_merger(vision)


def _vision_blocks(vision: VisionShape) -> Iterator[Weight]:
    hidden = vision.hidden_size
    blocks = tuple(range(vision.depth))
    linears = {
        "attn.qkv": (3 * hidden, hidden),
        "attn.proj": (hidden, hidden),
        "mlp.linear_fc1": (vision.intermediate_size, hidden),
        "mlp.linear_fc2": (hidden, vision.intermediate_size),
    }
    for module, shape in linears.items():
        yield Weight("vision", module, "weight", shape, "linear", blocks, "vision")
        yield Weight("vision", module, "bias", shape[:1], "parameter", blocks, "vision")
    for module in ("norm1", "norm2"):
        for parameter in ("weight", "bias"):
            yield Weight("vision", module, parameter, (hidden,), "parameter", blocks, "vision")


def _vision_merger(vision: VisionShape) -> Iterator[Weight]:
    merged = vision.hidden_size * vision.merge**2
    for parameter in ("weight", "bias"):
        yield _outside("vision_merger", "model.visual.merger.norm", (vision.hidden_size,), "parameter", parameter)
    linears = {"linear_fc1": (merged, merged), "linear_fc2": (vision.out_hidden_size, merged)}
    for name, shape in linears.items():
        yield _outside("vision_merger", f"model.visual.merger.{name}", shape, "linear")
        yield _outside("vision_merger", f"model.visual.merger.{name}", shape[:1], "parameter", "bias")
