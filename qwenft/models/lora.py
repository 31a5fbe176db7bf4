"""LoRA through peft: put on by role, and saved so that stock peft and servers load it."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import peft
import peft.tuners.lora.bnb
import torch
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file

from qwenft.errors import SpecError
from qwenft.kernels.experts import LowRank
from qwenft.kernels.lora import lora_product
from qwenft.kernels.quantized import dense_shape, is_quantized
from qwenft.models.precision import CastLinear, RoutedExperts
from qwenft.models.quantize import Linear4bit, Linear8bit
from qwenft.plan.coverage import trained_weights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qwenft.family.architectures import Architecture
    from qwenft.specs.adapter import AdapterSpec

_TEXT_ALONE = "base_model.model.model."
_IN_VISION_LANGUAGE = "base_model.model.model.language_model."


class _Fused:
    """The plain case of peft's layer, one adapter beside a frozen Linear, as one node of the graph.

    DoRA, dropout, several active adapters, merged or disabled ones, and modules with hooks go through peft's own
    forward.
    """

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., I] to [..., O]."""
        adapter = None if args or kwargs else self._plain_adapter()
        if adapter is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return lora_product(x, self.base_layer.weight, a, b, self.scaling[adapter])

    def _plain_adapter(self: Any) -> str | None:
        """The active adapter, where it is all that this layer is asked for."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] in self.lora_variant:
            return None
        name: str = active[0]
        drops = self.training and not isinstance(self.lora_dropout[name], torch.nn.Identity)
        linears = (self.base_layer, self.lora_A[name], self.lora_B[name])
        is_plain = not drops and not self.base_layer.weight.requires_grad and all(map(_is_plain, linears))
        return name if is_plain else None


class LoraLinear(_Fused, peft.tuners.lora.Linear):
    """Beside a Linear."""


class LoraLinear4bit(_Fused, peft.tuners.lora.bnb.Linear4bit):
    """Beside a Linear in nf4."""


class LoraLinear8bit(_Fused, peft.tuners.lora.bnb.Linear8bitLt):
    """Beside a Linear in int8."""


class ParamWrapper(peft.tuners.lora.ParamWrapper):
    """Beside a stack of experts: peft's own layer, which would make the whole stack anew at every call.

    The pairs of its adapters go to the experts; stacks may be quantized. peft knows the class by its name.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What :class:`RoutedExperts` takes, to [T, H]."""
        self._check_forward_args(x, *args, **kwargs)
        pairs: dict[str, LowRank] = {}
        module: Any = self
        while isinstance(module, ParamWrapper):
            if (pair := module.pair()) is not None:
                # Laid out once, and not at the product of every expert.
                pairs[module.parameter_name] = attrs.evolve(pair, b=pair.b.contiguous())
            module = module.base_layer
        answers: torch.Tensor = module(x, *args, **kwargs, **pairs)
        return answers

    def pair(self) -> LowRank | None:
        """The pairs of all active adapters as one, or None where there is none beside the stack."""
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        pairs = [self.pair_of(name) for name in active]
        if len(pairs) < 2:
            return pairs[0] if pairs else None
        a = torch.cat([pair.a for pair in pairs], dim=1)
        return LowRank(a, torch.cat([pair.b * pair.scaling for pair in pairs], dim=2), 1.0)

    def pair_of(self, adapter: str) -> LowRank:
        """One adapter's."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        # As peft lays them out: the experts are the slow index of A's rows and the fast one of B's columns.
        of_experts = b.view(len(b), -1, self.num_experts).permute(2, 0, 1)
        return LowRank(a.view(self.num_experts, -1, a.shape[1]), of_experts, self.scaling[adapter])

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Add the adapter to the stack.

        Raises:
            SpecError: the stack is quantized.
        """
        if is_quantized(self.get_param()):
            raise SpecError("experts that are quantized cannot be merged in memory", fix="run.export(path)")
        super().merge(*args, **kwargs)


_LINEARS = (torch.nn.Linear, CastLinear, Linear4bit, Linear8bit)
_FUSED: dict[type, Any] = {
    peft.tuners.lora.Linear: LoraLinear,
    peft.tuners.lora.bnb.Linear4bit: LoraLinear4bit,
    peft.tuners.lora.bnb.Linear8bitLt: LoraLinear8bit,
}


def _is_plain(linear: Any) -> bool:
    """Whether a Linear is its weight alone, so that nobody would notice that it is not called."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(linear) in _LINEARS
        and linear.bias is None
        and dense_shape(linear.weight) == (linear.out_features, linear.in_features)
        and not any(getattr(linear, kind) for kind in kinds)
    )


@contextmanager
def _full_shapes(model: Any) -> Iterator[None]:
    """Stand for quantized stacks by tensors of their shapes, of which peft makes its own; they take no memory."""
    held = []
    for module in model.modules():
        for name, stack in (
            list(module.named_parameters(recurse=False)) if isinstance(module, RoutedExperts) else ()
        ):
            if is_quantized(stack):
                held.append((module, name, stack))
                shape = torch.empty(1, device=stack.device).expand(dense_shape(stack))
                setattr(module, name, torch.nn.Parameter(shape, requires_grad=False))
    try:
        yield
    finally:
        for module, name, stack in held:
            setattr(module, name, stack)


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
    with torch.random.fork_rng(), warnings.catch_warnings(), _full_shapes(model):
        # peft 0.21 asks transformers 5.23 by the older of two names.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        # It applies ranks of parameters, and looks for them among modules alone.
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        # peft would write the folder that was loaded into the adapter's files, and warn that it differs.
        model.name_or_path = config.base_model_name_or_path
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, config)
    for module in adapted.modules():
        module.__class__ = _FUSED.get(type(module), type(module))
        if isinstance(module, peft.tuners.lora.ParamWrapper) and isinstance(
            module.get_base_layer(), RoutedExperts
        ):
            module.__class__ = ParamWrapper
    return adapted


def require_reached(model: Any, loaded: Architecture, adapter: AdapterSpec) -> None:
    """Refuse an adapter that reaches other weights than its plan says, or none.

    Raises:
        SpecError: such.
    """
    planned = sum(entry.parameters for entry in trained_weights(loaded, adapter))
    reached = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if reached != planned:
        raise SpecError(
            f"the adapter has {reached:,} parameters, and its plan {planned:,}: it does not reach what was meant",
            fix="roles (.on) instead of targets of your own, or the installed peft as qwenft requires it",
            got=reached,
            expected=planned,
        )


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
