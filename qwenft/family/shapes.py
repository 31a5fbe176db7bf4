"""The parts of an architecture that are shapes of their own, each with its spelling in a config.json.

Defaults of what a file leaves out are those of transformers 5.23, configuration_qwen3_5.py and
configuration_qwen3_5_moe.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from qwenft.family.config_fields import ConfigFields

#: More decoder layers, layers of a tower or experts than any model of the family will have.
MOST_LAYERS = 2**12
# Where a config.json leaves the rotary base out, transformers takes this one, not the family's 1e7.
_THETA_OF_TRANSFORMERS = 10_000.0


@attrs.frozen
class ExpertShape:
    """The mixture of experts of one decoder layer.

    Args:
        count: experts to choose from.
        top_k: experts that each token visits.
        intermediate_size: width of one routed expert.
        shared_intermediate_size: width of the expert that every token visits.
    """

    count: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int

    @classmethod
    def from_fields(cls, text: ConfigFields) -> ExpertShape:
        """Read it from the text half of a config.json."""
        return cls(
            count=text.integer("num_experts", 256, most=MOST_LAYERS),
            top_k=text.integer("num_experts_per_tok", 8),
            intermediate_size=text.integer("moe_intermediate_size", 512),
            shared_intermediate_size=text.integer("shared_expert_intermediate_size", 512),
        )

    def to_config(self) -> dict[str, Any]:
        """The same fields as the text half of a config.json has them."""
        return {
            "num_experts": self.count,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.intermediate_size,
            "shared_expert_intermediate_size": self.shared_intermediate_size,
        }


@attrs.frozen
class VisionShape:
    """The vision tower and its merger.

    Args:
        hidden_size: width of the tower.
        depth: number of blocks.
        intermediate_size: width of the MLP of a block.
        heads: attention heads of a block.
        out_hidden_size: width that the merger hands to the text half; that half's ``hidden_size``.
        patch: side of a patch, in pixels.
        temporal: frames in a patch.
        merge: side of the square of patches that becomes one token.
        position_embeddings: learned positions, a square grid.
        in_channels: colour channels.
    """

    hidden_size: int
    depth: int
    intermediate_size: int
    heads: int
    out_hidden_size: int
    patch: int = 16
    temporal: int = 2
    merge: int = 2
    position_embeddings: int = 2304
    in_channels: int = 3

    @classmethod
    def from_fields(cls, vision: ConfigFields) -> VisionShape:
        """Read it from the ``vision_config`` of a config.json."""
        return cls(
            hidden_size=vision.integer("hidden_size", 1152),
            depth=vision.integer("depth", 27, most=MOST_LAYERS),
            intermediate_size=vision.integer("intermediate_size", 4304),
            heads=vision.integer("num_heads", 16),
            out_hidden_size=vision.integer("out_hidden_size", 3584),
            patch=vision.integer("patch_size", 16),
            temporal=vision.integer("temporal_patch_size", 2),
            merge=vision.integer("spatial_merge_size", 2),
            position_embeddings=vision.integer("num_position_embeddings", 2304),
            in_channels=vision.integer("in_channels", 3),
        )

    def to_config(self) -> dict[str, Any]:
        """The same fields as a ``vision_config`` has them."""
        return {
            "hidden_size": self.hidden_size,
            "depth": self.depth,
            "intermediate_size": self.intermediate_size,
            "num_heads": self.heads,
            "out_hidden_size": self.out_hidden_size,
            "patch_size": self.patch,
            "temporal_patch_size": self.temporal,
            "spatial_merge_size": self.merge,
            "num_position_embeddings": self.position_embeddings,
            "in_channels": self.in_channels,
        }


@attrs.frozen
class RopeShape:
    """The rotary position embedding of the text half.

    Args:
        theta: its base.
        partial_factor: the part of each head that is rotated.
        sections: frequencies given to time, height and width, interleaved.
    """

    theta: float = 1e7
    partial_factor: float = 0.25
    sections: tuple[int, ...] = (11, 11, 10)

    @classmethod
    def from_fields(cls, text: ConfigFields) -> RopeShape:
        """Read it from the text half of a config.json; older files have no ``rope_parameters`` around it."""
        rope = text.optional_section("rope_parameters")
        theta = text.number("rope_theta", _THETA_OF_TRANSFORMERS)
        return cls(
            theta=rope.number("rope_theta", theta),
            partial_factor=rope.number("partial_rotary_factor", text.number("partial_rotary_factor", 0.25)),
            sections=rope.integers("mrope_section", (11, 11, 10)),
        )

    def to_config(self) -> dict[str, Any]:
        """The same fields as a ``rope_parameters`` has them."""
        return {
            "rope_type": "default",
            "rope_theta": self.theta,
            "partial_rotary_factor": self.partial_factor,
            "mrope_interleaved": True,
            "mrope_section": list(self.sections),
        }


@attrs.frozen
class VisionTokens:
    """The token ids that stand for, or enclose, an image or a video."""

    image: int = 248056
    video: int = 248057
    vision_start: int = 248053
    vision_end: int = 248054

    @classmethod
    def from_fields(cls, top: ConfigFields) -> VisionTokens:
        """Read it from a config.json."""
        family = cls()
        return cls(
            image=top.integer("image_token_id", family.image),
            video=top.integer("video_token_id", family.video),
            vision_start=top.integer("vision_start_token_id", family.vision_start),
            vision_end=top.integer("vision_end_token_id", family.vision_end),
        )

    def to_config(self) -> dict[str, Any]:
        """The same fields as a config.json has them."""
        return {
            "image_token_id": self.image,
            "video_token_id": self.video,
            "vision_start_token_id": self.vision_start,
            "vision_end_token_id": self.vision_end,
        }
