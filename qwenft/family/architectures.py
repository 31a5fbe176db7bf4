"""The sizes of the Qwen3.5 family, and the reading of any checkpoint of it from its config.json.

Qwen3.5, 3.6 and 3.8 share the classes of transformers/models/qwen3_5 and qwen3_5_moe; defaults here are those of
their configuration files.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import attrs

from qwenft.errors import CheckpointError, SpecError
from qwenft.family.config_fields import ConfigFields
from qwenft.family.shapes import MOST_LAYERS, ExpertShape, RopeShape, VisionShape, VisionTokens

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "CLASS_NAMES",
    "END_OF_TEXT",
    "FAMILY",
    "FULL_ATTENTION",
    "LINEAR_ATTENTION",
    "Architecture",
    "ExpertShape",
    "RopeShape",
    "VisionShape",
    "VisionTokens",
    "architecture",
    "every_fourth_full",
    "find",
]

#: The id of ``<|endoftext|>``, with which the family's config.json ends a text.
END_OF_TEXT = 248_044

LINEAR_ATTENTION = "linear_attention"
FULL_ATTENTION = "full_attention"

#: Every model type that qwenft trains, and the class of transformers that holds it.
CLASS_NAMES = {
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}
_MOE_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
_TEXT_TYPES = ("qwen3_5_text", "qwen3_5_moe_text")


def every_fourth_full(layers: int, interval: int = 4) -> tuple[str, ...]:
    """The layer types of the family: Gated DeltaNet, with full attention in every ``interval``-th layer."""
    return tuple(FULL_ATTENTION if (index + 1) % interval == 0 else LINEAR_ATTENTION for index in range(layers))


@attrs.frozen
class Architecture:
    """The shape of one model of the family.

    Args:
        name: what messages call it, such as "qwen3.5-27b".
        hub_id: its id on the hub, or None for a checkpoint that was only read from a folder.
        layers: decoder layers, L.
        hidden_size: width of the residual stream.
        intermediate_size: width of the dense MLP; None where there are experts.
        query_heads: H.
        key_value_heads: G, a divisor of H.
        gdn_value_heads: V, a multiple of K.
        tied: the output head is the embedding.
        vision: the vision tower, or None for a text-only checkpoint.
        experts: the mixture of experts, or None for a dense model.
        head_dim: D of full attention.
        gdn_key_heads: K.
        gdn_key_dim: D of Gated DeltaNet.
        gdn_value_dim: E of Gated DeltaNet.
        conv_kernel: W, taps of the short convolution.
        vocabulary: rows of the embedding.
        context: the longest sequence, in tokens.
        rope: the rotary position embedding.
        vision_tokens: the ids of the vision tokens.
        has_mtp: the checkpoint has one more layer, which predicts the token after next (``mtp.*``) with the
            embedding and the head of the model.
        loads_mtp: that layer is loaded; transformers leaves it out. See :meth:`with_mtp`.
        layer_types: "linear_attention" or "full_attention" for each layer; every fourth full unless given.

    Raises:
        SpecError: heads that do not divide, layer types of another number or name, or not exactly one of
            ``intermediate_size`` and ``experts``.
    """

    name: str
    hub_id: str | None
    layers: int
    hidden_size: int
    intermediate_size: int | None
    query_heads: int
    key_value_heads: int
    gdn_value_heads: int
    tied: bool
    vision: VisionShape | None = None
    experts: ExpertShape | None = None
    head_dim: int = 256
    gdn_key_heads: int = 16
    gdn_key_dim: int = 128
    gdn_value_dim: int = 128
    conv_kernel: int = 4
    vocabulary: int = 248_320
    context: int = 262_144
    rope: RopeShape = attrs.field(factory=RopeShape)
    vision_tokens: VisionTokens = attrs.field(factory=VisionTokens)
    has_mtp: bool = False
    loads_mtp: bool = False
    layer_types: tuple[str, ...] = attrs.field(converter=tuple)

    @layer_types.default
    def _every_fourth_full(self) -> tuple[str, ...]:
        return every_fourth_full(self.layers)

    def __attrs_post_init__(self) -> None:
        problem = self._contradiction()
        if problem is not None:
            msg = f"{self.name}: {problem}"
            raise SpecError(msg, architecture=self.name)

    @property
    def is_moe(self) -> bool:
        """Whether the MLP is a mixture of experts."""
        return self.experts is not None

    @property
    def is_text_only(self) -> bool:
        """Whether there is no vision tower."""
        return self.vision is None

    @property
    def model_type(self) -> str:
        """The ``model_type`` of its config.json."""
        return f"qwen3_5{'_moe' if self.is_moe else ''}{'_text' if self.is_text_only else ''}"

    @property
    def class_name(self) -> str:
        """The class of transformers that holds it whole."""
        return CLASS_NAMES[self.model_type]

    @property
    def full_attention_layers(self) -> tuple[int, ...]:
        """The indices of the layers with softmax attention."""
        return self._layers_of(FULL_ATTENTION)

    @property
    def linear_attention_layers(self) -> tuple[int, ...]:
        """The indices of the layers with Gated DeltaNet."""
        return self._layers_of(LINEAR_ATTENTION)

    def text_only(self) -> Architecture:
        """The same model without its vision tower, as ``...ForCausalLM`` loads it."""
        return attrs.evolve(self, vision=None, vision_tokens=VisionTokens())

    def with_mtp(self) -> Architecture:
        """The same model with its multi-token-prediction layer, where it has one."""
        return attrs.evolve(self, loads_mtp=self.has_mtp)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str, *, hub_id: str | None = None) -> Architecture:
        """Read the config.json of a checkpoint; a field that is left out has transformers' default.

        Args:
            config: the parsed file.
            name: what messages shall call the checkpoint.
            hub_id: its id on the hub, where it has one.

        Returns:
            The architecture. What does not shape the model (dropout, initialisation, a rope scaling) is not kept.

        Raises:
            CheckpointError: another family, a field that is missing, ill-typed, or contradicts another.
        """
        top = ConfigFields(config, name)
        model_type = top.text("model_type")
        if model_type not in CLASS_NAMES:
            supported = ", ".join(CLASS_NAMES)
            msg = f"{name} is a {model_type} checkpoint; qwenft trains {supported}"
            raise CheckpointError(
                msg, source=name, field="model_type", got=model_type, expected=tuple(CLASS_NAMES)
            )
        text = top if model_type in _TEXT_TYPES else top.section("text_config")
        shape = _text_fields(text, moe=model_type in _MOE_TYPES)
        if model_type not in _TEXT_TYPES:
            shape["vision"] = VisionShape.from_fields(top.optional_section("vision_config"))
            shape["vision_tokens"] = VisionTokens.from_fields(top)
        # The outer flag is the one that transformers ties by.
        shape["tied"] = top.boolean("tie_word_embeddings", default=False)
        try:
            return cls(name=name, hub_id=hub_id, **shape)
        except SpecError as error:
            fix = "config.json as the checkpoint was published"
            raise CheckpointError(f"{error} in config.json", fix=fix, source=name, **error.values) from error

    def to_config(self) -> dict[str, Any]:
        """A config.json from which transformers builds this shape.

        Returns:
            A mapping for ``json.dump``, new at each call. ``from_config`` reads it back equal; it is not meant to
            replace the file of a checkpoint, which says more.
        """
        text = self._text_config()
        if self.vision is None:
            return {"architectures": [self.class_name], **text}
        return {
            "architectures": [self.class_name],
            "model_type": self.model_type,
            **self.vision_tokens.to_config(),
            "tie_word_embeddings": self.tied,
            "text_config": text,
            "vision_config": {"model_type": f"{self.model_type}_vision", **self.vision.to_config()},
        }

    def _layers_of(self, layer_type: str) -> tuple[int, ...]:
        return tuple(index for index, found in enumerate(self.layer_types) if found == layer_type)

    def _contradiction(self) -> str | None:
        if (self.intermediate_size is None) == (self.experts is None):
            return "exactly one of intermediate_size and experts must be given"
        if self.query_heads % self.key_value_heads:
            return f"{self.query_heads} query heads are not a multiple of {self.key_value_heads} key/value heads"
        if self.gdn_value_heads % self.gdn_key_heads:
            return (
                f"{self.gdn_value_heads} GDN value heads are not a multiple of {self.gdn_key_heads} GDN key heads"
            )
        if len(self.layer_types) != self.layers:
            return f"{len(self.layer_types)} layer_types for {self.layers} layers"
        unknown = sorted(set(self.layer_types) - {LINEAR_ATTENTION, FULL_ATTENTION})
        if unknown:
            return f"unknown layer_types {', '.join(unknown)}; expected {LINEAR_ATTENTION} or {FULL_ATTENTION}"
        return None

    def _text_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "model_type": f"qwen3_5{'_moe' if self.is_moe else ''}_text",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "layer_types": list(self.layer_types),
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_dim,
            "linear_num_key_heads": self.gdn_key_heads,
            "linear_num_value_heads": self.gdn_value_heads,
            "linear_key_head_dim": self.gdn_key_dim,
            "linear_value_head_dim": self.gdn_value_dim,
            "linear_conv_kernel_dim": self.conv_kernel,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": self.tied,
            "rope_parameters": self.rope.to_config(),
            "mtp_num_hidden_layers": int(self.has_mtp),
        }
        # A cut vocabulary, as tiny models have, does not hold the token.
        if self.vocabulary > END_OF_TEXT:
            config["eos_token_id"] = END_OF_TEXT
        if self.experts is None:
            config["intermediate_size"] = self.intermediate_size
            return config
        return {**config, **self.experts.to_config()}


def find(name_or_hub_id: str) -> Architecture | None:
    """The packaged architecture of a family name or hub id, in any case, or None.

    >>> find("Qwen/Qwen3.5-27B").name
    'qwen3.5-27b'
    """
    wanted = name_or_hub_id.lower()
    if wanted in FAMILY:
        return FAMILY[wanted]
    for candidate in FAMILY.values():
        if candidate.hub_id is not None and candidate.hub_id.lower() == wanted:
            return candidate
    return None


def architecture(name_or_hub_id: str) -> Architecture:
    """The packaged architecture of a family name or hub id, in any case.

    Raises:
        SpecError: there is none of that name; the message offers the nearest.
    """
    found = find(name_or_hub_id)
    if found is not None:
        return found
    wanted = name_or_hub_id.lower()
    by_lower = {}
    for candidate in FAMILY.values():
        by_lower[candidate.name] = candidate.name
        by_lower[str(candidate.hub_id).lower()] = str(candidate.hub_id)
    matches = difflib.get_close_matches(wanted, by_lower, n=1)
    nearest = by_lower[matches[0]] if matches else None
    known = ", ".join(FAMILY)
    msg = f"no packaged architecture is called {name_or_hub_id!r}; the family has {known}"
    fix = None if nearest is None else f'"{nearest}"'
    raise SpecError(msg, fix=fix, got=name_or_hub_id, expected=tuple(FAMILY), nearest=nearest)


def _text_fields(text: ConfigFields, *, moe: bool) -> dict[str, Any]:
    """The arguments of `Architecture` that stand in the text half of a config.json."""
    if text.boolean("attention_bias", default=False):
        raise text.wrong("attention_bias", "false, as in the whole family")
    layers = text.integer("num_hidden_layers", 40 if moe else 32, most=MOST_LAYERS)
    interval = text.integer("full_attention_interval", 4)
    return {
        "layers": layers,
        "hidden_size": text.integer("hidden_size", 2048 if moe else 4096),
        "intermediate_size": None if moe else text.integer("intermediate_size", 12_288),
        "query_heads": text.integer("num_attention_heads", 16),
        "key_value_heads": text.integer("num_key_value_heads", 2 if moe else 4),
        "head_dim": text.integer("head_dim", 256),
        "gdn_key_heads": text.integer("linear_num_key_heads", 16),
        "gdn_value_heads": text.integer("linear_num_value_heads", 32),
        "gdn_key_dim": text.integer("linear_key_head_dim", 128),
        "gdn_value_dim": text.integer("linear_value_head_dim", 128),
        "conv_kernel": text.integer("linear_conv_kernel_dim", 4),
        "vocabulary": text.integer("vocab_size", 248_320),
        "context": text.integer("max_position_embeddings", 32_768),
        "layer_types": text.strings("layer_types") or every_fourth_full(layers, interval),
        "rope": RopeShape.from_fields(text),
        "experts": ExpertShape.from_fields(text) if moe else None,
        # Another number, or embeddings of its own: none of the family has these, and they are copied as they are.
        "has_mtp": text.count("mtp_num_hidden_layers", 0) == 1
        and not text.boolean("mtp_use_dedicated_embeddings", default=False),
    }


def _packaged(
    size: str,
    layers: int,
    hidden_size: int,
    heads: tuple[int, int, int],
    tower: tuple[int, int, int, int],
    *,
    intermediate_size: int | None = None,
    experts: ExpertShape | None = None,
    tied: bool = False,
) -> Architecture:
    """One row of the family's table: ``heads`` are query, key/value and GDN value; ``tower`` as in VisionShape."""
    query_heads, key_value_heads, gdn_value_heads = heads
    return Architecture(
        name=f"qwen3.5-{size.lower()}",
        hub_id=f"Qwen/Qwen3.5-{size}",
        layers=layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        query_heads=query_heads,
        key_value_heads=key_value_heads,
        gdn_value_heads=gdn_value_heads,
        tied=tied,
        experts=experts,
        vision=VisionShape(*tower, out_hidden_size=hidden_size),
        has_mtp=True,
    )


_SMALL_TOWER = (768, 12, 3072, 12)
_MIDDLE_TOWER = (1024, 24, 4096, 16)
_LARGE_TOWER = (1152, 27, 4304, 16)

_ROWS = (
    _packaged("0.8B", 24, 1024, (8, 2, 16), _SMALL_TOWER, intermediate_size=3584, tied=True),
    _packaged("2B", 24, 2048, (8, 2, 16), _MIDDLE_TOWER, intermediate_size=6144, tied=True),
    _packaged("4B", 32, 2560, (16, 4, 32), _MIDDLE_TOWER, intermediate_size=9216, tied=True),
    _packaged("9B", 32, 4096, (16, 4, 32), _LARGE_TOWER, intermediate_size=12_288),
    _packaged("27B", 64, 5120, (24, 4, 48), _LARGE_TOWER, intermediate_size=17_408),
    _packaged("35B-A3B", 40, 2048, (16, 2, 32), _LARGE_TOWER, experts=ExpertShape(256, 8, 512, 512)),
    _packaged("122B-A10B", 48, 3072, (32, 2, 64), _LARGE_TOWER, experts=ExpertShape(256, 8, 1024, 1024)),
    _packaged("397B-A17B", 60, 4096, (32, 2, 64), _LARGE_TOWER, experts=ExpertShape(512, 10, 1024, 1024)),
)

#: The eight sizes that are on the hub, by family name.
FAMILY: dict[str, Architecture] = {row.name: row for row in _ROWS}
