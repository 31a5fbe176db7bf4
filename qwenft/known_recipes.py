"""Recipes that are known to be good beginnings, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from qwenft.errors import SpecError, nearest
from qwenft.family.architectures import find
from qwenft.plan.coverage import trained_weights
from qwenft.recipe import Recipe
from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.model import ModelSpec
from qwenft.specs.parallel import ParallelSpec
from qwenft.specs.training import TrainingSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

_LORA_RATE, _FULL_RATE = 2e-4, 1e-5
#: Rank of the routed experts that a preset tells of: of each the rank is also how many pairs see a token.
_EXPERT_RANK = 4
#: What a float32 pair takes for each parameter: itself, its gradient and two moments.
_PAIR_BYTES = 16


@attrs.frozen
class Preset:
    """A recipe with a name.

    Args:
        recipe: without data.
        machine: the smallest of those that ``Machine.named`` knows that it fits, with rows of 2,048 tokens.
        levers: what it owes that to, in words.
    """

    recipe: Recipe
    machine: str
    levers: str

    def __str__(self) -> str:
        return f"{self.levers}; fits {self.machine}"


def _lora(model: ModelSpec, parallel: ParallelSpec | None = None) -> Recipe:
    """On every projection of the language model that each token passes: both attentions, and the (shared) MLP."""
    return Recipe(
        model,
        adapter=AdapterSpec.lora(rank=16, alpha=32),
        training=TrainingSpec(learning_rate=_LORA_RATE),
        parallel=parallel or ParallelSpec.single(),
    )


def _full(model: ModelSpec, parallel: ParallelSpec | None = None) -> Recipe:
    """All weights, each updated as soon as its gradient is whole."""
    training = TrainingSpec(
        learning_rate=_FULL_RATE, optimizer="adamw_8bit", optimizer_in_backward=True, max_grad_norm=None
    )
    return Recipe(model, adapter=AdapterSpec.full(), training=training, parallel=parallel or ParallelSpec.single())


def _model(size: str) -> ModelSpec:
    return ModelSpec(f"Qwen/Qwen3.5-{size}")


_CHECKPOINTED = "activation checkpointing"
_SHARED = "weights shared out (FSDP2)"
_IN_FULL = f"{_CHECKPOINTED}, moments in 8 bits, the update in backward"
_QLORA = f"nf4 with quantized scales, {_CHECKPOINTED}"

PRESETS: Mapping[str, Preset] = {
    "9b-lora-vision": Preset(_lora(_model("9B").with_vision()), "RTX4090", _CHECKPOINTED),
    "9b-fft-vision": Preset(_full(_model("9B").with_vision()), "L40S", _IN_FULL),
    "27b-qlora": Preset(_lora(_model("27B").quantize("nf4")), "RTX4090", _QLORA),
    "27b-fft": Preset(_full(_model("27B"), ParallelSpec.fsdp2()), "4xA100-40GB", f"{_IN_FULL}, {_SHARED}"),
    "27b-qlora-fsdp": Preset(
        _lora(_model("27B").quantize("nf4"), ParallelSpec.fsdp2()), "2xRTX4090", f"{_QLORA}, {_SHARED}"
    ),
    "35b-a3b-moe-qlora": Preset(_lora(_model("35B-A3B").quantize("nf4")), "RTX4090", _QLORA),
    "35b-a3b-moe-qlora-fsdp": Preset(
        _lora(_model("35B-A3B").quantize("nf4"), ParallelSpec.fsdp2()), "2xRTX4090", f"{_QLORA}, {_SHARED}"
    ),
    "122b-a10b-moe-qlora": Preset(_lora(_model("122B-A10B").quantize("nf4")), "A100-80GB", _QLORA),
    "122b-a10b-moe-qlora-fsdp": Preset(
        _lora(_model("122B-A10B").quantize("nf4"), ParallelSpec.fsdp2()), "4xRTX4090", f"{_QLORA}, {_SHARED}"
    ),
    "35b-a3b-moe-vision-lora": Preset(_lora(_model("35B-A3B").with_vision()), "A100-80GB", _CHECKPOINTED),
}


def presets() -> dict[str, str]:
    """The names that :func:`preset` knows, and what lets each fit which machine, with rows of 2,048 tokens.

    Examples:
        >>> presets()["27b-qlora"]
        'nf4 with quantized scales, activation checkpointing; fits RTX4090'
    """
    return {name: str(known) for name, known in PRESETS.items()}


def preset(name: str) -> Recipe:
    """A recipe by its name, without data; change it as any other.

    Learning rates are those of the method (2e-4 for LoRA, 1e-5 for full fine-tuning). Adapters are on all
    projections of both attentions and of the MLP; of a mixture of experts on the shared expert, and the recipe's
    notes say what the routed experts would take.

    Raises:
        SpecError: there is no such preset.

    Examples:
        >>> preset("27b-qlora").with_adapter(rank=8).adapter.rank
        8
    """
    known = PRESETS.get(name)
    if known is None:
        raise SpecError(
            f"preset: there is none called {name!r}{nearest(str(name), PRESETS)}",
            fix=f"one of {', '.join(PRESETS)}",
            got=name,
            expected=tuple(PRESETS),
        )
    return attrs.evolve(known.recipe, notes=_notes(known.recipe))


def _notes(recipe: Recipe) -> tuple[str, ...]:
    """What adapters of routed experts would take beside the others."""
    known = find(recipe.model.source)
    assert known is not None
    loaded = known.text_only()
    if not loaded.is_moe or recipe.adapter.kind != "lora":
        return ()
    entries = trained_weights(loaded, AdapterSpec.lora(rank=_EXPERT_RANK).on("routed_experts"))
    count = sum(entry.parameters for entry in entries)
    line = f'.on(..., "routed_experts").with_rank(routed_experts={_EXPERT_RANK})'
    size = f"{_PAIR_BYTES * count / 2**30:.1f} GiB with gradients and moments"
    return (f"routed experts are not adapted: {line} trains {count / 1e6:,.0f} M parameters more, {size}",)
