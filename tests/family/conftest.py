"""Real classes of transformers, the outside oracle of this folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import transformers

from qwenft.family.architectures import FULL_ATTENTION, LINEAR_ATTENTION, Architecture, ExpertShape, VisionShape

if TYPE_CHECKING:
    from collections.abc import Callable

# No two sizes are equal, so that a swapped dimension or a wrong layer shows.
UNEVEN_TYPES = (FULL_ATTENTION, LINEAR_ATTENTION, LINEAR_ATTENTION, FULL_ATTENTION, LINEAR_ATTENTION)
TINY_VISION = VisionShape(
    hidden_size=12,
    depth=3,
    intermediate_size=28,
    heads=2,
    out_hidden_size=20,
    patch=3,
    temporal=2,
    merge=2,
    position_embeddings=16,
    in_channels=3,
)


def tiny(*, moe: bool) -> Architecture:
    """A model of a few thousand parameters with uneven sizes, dense or with experts."""
    return Architecture(
        name="tiny-moe" if moe else "tiny-dense",
        hub_id=None,
        layers=5,
        hidden_size=20,
        intermediate_size=None if moe else 44,
        query_heads=6,
        key_value_heads=2,
        gdn_value_heads=9,
        tied=False,
        vision=TINY_VISION,
        experts=ExpertShape(count=5, top_k=2, intermediate_size=14, shared_intermediate_size=18) if moe else None,
        head_dim=16,
        gdn_key_heads=3,
        gdn_key_dim=10,
        gdn_value_dim=7,
        conv_kernel=3,
        vocabulary=61,
        context=128,
        layer_types=UNEVEN_TYPES,
    )


def build(architecture: Architecture, device: str) -> torch.nn.Module:
    """The class of transformers that its config.json names."""
    model_class = getattr(transformers, architecture.class_name)
    config = model_class.config_class.from_dict(architecture.to_config())
    with torch.device(device):
        return model_class(config)


@pytest.fixture(scope="session")
def on_meta() -> Callable[[Architecture], torch.nn.Module]:
    """Builds a model without memory for its weights, once a session."""
    built: dict[Architecture, torch.nn.Module] = {}

    def model(architecture: Architecture) -> torch.nn.Module:
        if architecture not in built:
            built[architecture] = build(architecture, "meta")
        return built[architecture]

    return model


@pytest.fixture(params=["dense", "moe"])
def tiny_architecture(request: pytest.FixtureRequest) -> Architecture:
    return tiny(moe=request.param == "moe")


@pytest.fixture
def on_cpu() -> Callable[[Architecture], torch.nn.Module]:
    """Builds a fresh small model with real weights, for peft to change."""
    return lambda architecture: build(architecture, "cpu")
