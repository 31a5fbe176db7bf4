"""LoRA through peft: put on by role, and saved so that stock peft and servers load it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file

from qwenft.kernels.lora import lora_product
from qwenft.models.precision import CastLinear
from qwenft.plan.coverage import trained_weights

if TYPE_CHECKING:
    from pathlib import Path

    from qwenft.family.architectures import Architecture
    from qwenft.specs.adapter import AdapterSpec

_TEXT_ALONE = "base_model.model.model."
_IN_VISION_LANGUAGE = "base_model.model.model.language_model."


class LoraLinear(peft.tuners.lora.Linear):
    """peft's own layer, whose plain case, one adapter beside a frozen Linear, is one node of the graph.

    DoRA, dropout, several active adapters, merged or disabled ones, quantized bases and modules with hooks go
    through peft's own forward.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., I] to [..., O]."""
        adapter = None if args or kwargs else self._plain_adapter()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return lora_product(x, self.base_layer.weight, a, b, self.scaling[adapter])

    def _plain_adapter(self) -> str | None:
        """The active adapter, where it is all that this layer is asked for."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] in self.lora_variant:
            return None
        name = active[0]
        drops = self.training and not isinstance(self.lora_dropout[name], torch.nn.Identity)
        linears = (self.base_layer, self.lora_A[name], self.lora_B[name])
        is_plain = not drops and not self.base_layer.weight.requires_grad and all(map(_is_plain, linears))
        return name if is_plain else None


def _is_plain(linear: Any) -> bool:
    """Whether a Linear is its weight alone, so that nobody would notice that it is not called."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(linear) in (torch.nn.Linear, CastLinear)
        and linear.bias is None
        and linear.weight.shape == (linear.out_features, linear.in_features)
        and not any(getattr(linear, kind) for kind in kinds)
    )


def lora_config(loaded: Architecture, adapter: AdapterSpec, source: str) -> peft.LoraConfig:
    """The configuration of an adapter, as peft's own class.

    Args:
        loaded: the architecture as it is loaded.
        adapter: of kind "lora".
        source: the base checkpoint, written into the adapter's files.
    """
    trained = trained_weights(loaded, adapter)
    names = {
        target: {entry.weight.lora_name: entry.rank for entry in trained if entry.weight.lora_target == target}
        for target in ("module", "parameter")
    }
    return peft.LoraConfig(
        base_model_name_or_path=source,
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        target_modules=sorted(names["module"]),
        target_parameters=sorted(names["parameter"]) or None,
        rank_pattern={
            suffix: rank for of in names.values() for suffix, rank in of.items() if rank != adapter.rank
        },
    )


def add_lora(model: Any, config: peft.LoraConfig, *, seed: int) -> Any:
    """The model with LoRA beside its frozen weights; the caller's random state is left alone.

    Args:
        model: bound, as loaded.
        config: where, and of what rank.
        seed: of the initial values.
    """
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 by the older of two names.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, config)
    for module in adapted.modules():
        if type(module) is peft.tuners.lora.Linear:
            module.__class__ = LoraLinear
    return adapted


def base_name(parameter: str) -> str:
    """A parameter's name without what peft puts before those of the model it wraps."""
    return parameter.removeprefix("base_model.model.")


def save_adapter(model: Any, folder: Path, checkpoint: Architecture, loaded: Architecture) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into an empty folder.

    The names are those of the class that the checkpoint is published as: an adapter saved under the text half's
    names loads as nothing, without an error, wherever the vision-language class is served.

    Args:
        model: a peft model.
        folder: exists.
        checkpoint: the whole checkpoint's architecture.
        loaded: the part of it that was loaded.
    """
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    if loaded.is_text_only and not checkpoint.is_text_only:
        tensors = {_published(name): tensor for name, tensor in tensors.items()}
    save_file(
        {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = model.peft_config["default"]
    trained_in, config.inference_mode = config.inference_mode, True
    config.save_pretrained(folder)
    config.inference_mode = trained_in


def _published(name: str) -> str:
    return name.replace(_TEXT_ALONE, _IN_VISION_LANGUAGE, 1) if name.startswith(_TEXT_ALONE) else name
