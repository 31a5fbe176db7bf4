"""LoRA through peft: put on by role, and saved so that stock peft and servers load it."""

from __future__ import annotations

import copy
import json
import re
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file

from qwenft.errors import SpecError, nearest
from qwenft.family.inventory import inventory
from qwenft.models.adapter import TENSORS, Adapter, require_lora
from qwenft.models.bind import causal_of
from qwenft.models.lora_layers import OWN_LAYERS, ParamWrapper
from qwenft.models.precision import CastLinear, RoutedExperts
from qwenft.models.weights import canonical

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qwenft.family.architectures import Architecture
    from qwenft.family.inventory import Weight
    from qwenft.plan.coverage import TrainedWeight
    from qwenft.specs.adapter import AdapterSpec

_TEXT_ALONE = "base_model.model.model."
_IN_VISION_LANGUAGE = "base_model.model.model.language_model."
_VISION = "base_model.model.model.visual."
_WRAPPERS = re.compile(r"\.(base_layer|original_module|token_adapter|modules_to_save\.default)\b")


@contextmanager
def _stand_ins(model: Any, config: peft.LoraConfig) -> Iterator[None]:
    """Stand for weights of which peft needs shape and dtype alone by tensors that take no memory.

    These are quantized stacks of experts, of whose packed shape it would make nothing, and weights on the meta
    device, where it would put the pairs beside them. What it copies, or takes rows of, stays there.
    """
    copied = (*(config.modules_to_save or ()), *(config.trainable_token_indices or ()))
    held = []
    for path, module in model.named_modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            is_stack = isinstance(module, RoutedExperts) and weight.dtype.itemsize == 1
            if is_stack or (weight.is_meta and not path.endswith(copied)):
                held.append((module, name, weight))
                setattr(module, name, _stand_in(module, name, weight))
    try:
        yield
    finally:
        for module, name, weight in held:
            setattr(module, name, weight.requires_grad_(False))  # peft has frozen what stood for it


def _stand_in(module: Any, name: str, weight: Any) -> torch.nn.Parameter:
    device = "cpu" if weight.is_meta else weight.device
    if isinstance(module, RoutedExperts):
        shape = module.stack_shape(name)
        dtype = torch.float32 if weight.dtype.itemsize == 1 else weight.dtype
        return torch.nn.Parameter(torch.empty(1, dtype=dtype, device=device).expand(shape), requires_grad=False)
    empty = torch.empty(1, dtype=weight.dtype, device=device).expand(weight.shape)
    stand_in: torch.nn.Parameter = type(weight)(empty, requires_grad=False)
    vars(stand_in).update(vars(weight))  # what bitsandbytes keeps beside a weight
    return stand_in


def lora_config(
    loaded: Architecture, adapter: AdapterSpec, trained: tuple[TrainedWeight, ...], source: str
) -> peft.LoraConfig:
    """The configuration of an adapter, as peft's own class.

    Args:
        loaded: the architecture as it is loaded.
        adapter: of kind "lora".
        trained: what it comes to.
        source: the base checkpoint, written into the adapter's files.
    """
    whole = set(inventory(loaded))
    targets: dict[str, list[str]] = {"module": [], "parameter": []}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for entry in trained:
        weight = entry.weight
        if entry.how == "pair":
            assert weight.lora_target is not None
            names = (weight.lora_name,) if weight in whole else weight.layer_names
            targets[weight.lora_target].extend(names)
            ranks |= {name: entry.rank for name in names if entry.rank != adapter.rank}
            alphas |= {name: entry.alpha for name in names if entry.alpha != adapter.alpha}
    heads = ("embed_tokens",) if loaded.tied else ("embed_tokens", "lm_head")
    copies = {name for entry in trained if entry.how == "copy" for name in _copied(entry.weight, whole)}
    return peft.LoraConfig(
        base_model_name_or_path=source,
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        init_lora_weights=True if adapter.initialization == "kaiming" else adapter.initialization,
        target_modules=sorted(targets["module"]),
        target_parameters=sorted(targets["parameter"]) or None,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        modules_to_save=sorted(copies) or None,
        trainable_token_indices={name: list(adapter.tokens) for name in heads} if adapter.tokens else None,
        ensure_weight_tying=loaded.tied and "embed_tokens" in copies,
    )


def _copied(weight: Weight, whole: set[Weight]) -> tuple[str, ...]:
    """What names of modules to copy end in, for peft; it looks at no dot, and "norm" alone would end many."""
    if weight.module_suffix == "norm":
        return ("model.norm", "language_model.norm")
    if weight in whole:
        return (weight.module_suffix,)
    return tuple(f"layers.{layer}.{weight.module_suffix}" for layer in weight.layers)


def add_lora(model: Any, config: peft.LoraConfig, *, seed: int, on_meta: bool = False) -> Any:
    """The model with LoRA beside its frozen weights; the caller's random state is left alone.

    Args:
        model: bound, as loaded.
        config: where, and of what rank.
        seed: of the initial values.
        on_meta: leave the adapter on the meta device, until it is given values.
    """
    # peft would write the folder that was loaded into the adapter's files, and warn that it differs.
    model.name_or_path = config.base_model_name_or_path
    with _as_peft_expects(model, config, seed):
        adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=on_meta)
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer) and getattr(module, "lora_magnitude_vector", None):
            # Beside weights that are not there yet, what peft took for their lengths is none.
            module.lora_magnitude_vector.to(module.get_base_layer().weight.device)
    _use_own_layers(adapted)
    return adapted


def load_adapter(model: Any, name: str, config: peft.LoraConfig, adapter: Adapter, loaded: Architecture) -> None:
    """Put a further adapter beside those of a peft model; it is not active then.

    Args:
        model: of :func:`add_lora`.
        name: by which ``model.set_adapter`` knows it.
        config: of the adapter.
        adapter: its tensors.
        loaded: the architecture of the model as it is loaded.

    Raises:
        SpecError: there is one of that name.
    """
    if name in model.peft_config:
        raise SpecError(f"there is an adapter {name!r} already", fix=f'name="{name}-2"', got=name)
    active = model.active_adapter
    with _as_peft_expects(model, config, seed=0):
        model.add_adapter(name, config)
    _use_own_layers(model)
    put_adapter(model, adapter, loaded, name)
    model.set_adapter(active)  # what peft wraps anew knows of the new adapter alone


@contextmanager
def active_adapter(model: Any, name: str | None, *, base: bool = False) -> Iterator[None]:
    """Let one adapter of a peft model be active for all others, or none of them.

    Args:
        model: of :func:`add_lora`, or of full fine-tuning.
        name: of the adapter; the one that is active stays so where None.
        base: none of them.

    Raises:
        SpecError: there is no such adapter, or the base was trained itself.
    """
    known = list(getattr(model, "peft_config", ()))
    if base:
        if not known:
            problem = "base=True: the whole model was trained, and its base is not in memory"
            raise SpecError(problem, fix="AdapterSpec.lora(), which leaves it as it is", got=base)
        if name is not None:
            problem = f"base=True and adapter={name!r}: the base answers without any"
            raise SpecError(problem, fix=f"one of them, adapter={name!r} say", got=name)
        with model.disable_adapter():
            yield
        return
    before = getattr(model, "active_adapter", None)
    if name is None or name == before:
        yield
        return
    if name not in known:
        raise SpecError(
            f"there is no adapter {name!r}; there are {', '.join(known) or 'none'}{nearest(name, known)}",
            fix=f'run.load_adapter("path/to/{name}", "{name}")',
            got=name,
            expected=known,
        )
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(before)


@contextmanager
def _as_peft_expects(model: Any, config: peft.LoraConfig, seed: int) -> Iterator[None]:
    with torch.random.fork_rng(), warnings.catch_warnings(), _stand_ins(model, config):
        # peft 0.21 asks transformers 5.23 by the older of two names.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        # It applies ranks and alphas of parameters, and looks for them among modules alone.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        torch.manual_seed(seed)
        yield


def _use_own_layers(model: Any) -> None:
    """Give peft's layers our classes, and what is trained float32."""
    takes_out = str(model.peft_config["default"].init_lora_weights).startswith(("pissa", "olora"))
    module: Any
    for module in model.modules():
        module.__class__ = OWN_LAYERS.get(type(module), type(module))
        if isinstance(module, peft.tuners.lora.ParamWrapper) and isinstance(
            module.get_base_layer(), RoutedExperts
        ):
            module.__class__ = ParamWrapper
        if takes_out and getattr(module, "taken_out", ()) is None and "default" in module.lora_A:
            a, b = (part["default"].weight.detach().clone() for part in (module.lora_A, module.lora_B))
            module.taken_out = (a, b)
        if isinstance(module, ModulesToSaveWrapper):
            for copied in module.modules_to_save.values():
                if type(copied) is torch.nn.Linear and copied.bias is None:
                    copied.__class__ = CastLinear
                    # peft 0.21 builds a tied head with its sizes swapped.
                    copied.out_features, copied.in_features = copied.weight.shape
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()


def output_head(model: Any) -> Any:
    """The module that makes logits, with what is trained in its place."""
    head = causal_of(model).lm_head
    if isinstance(head, TrainableTokensWrapper):
        return head.token_adapter
    if isinstance(head, ModulesToSaveWrapper) and not head.disable_adapters:
        active = [name for name in head.active_adapters if name in head.modules_to_save]
        return head.modules_to_save[active[0]] if active else head.original_module
    return head


def _layers(model: Any) -> dict[str, Any]:
    """Peft's layers by the weights that they are beside, without ``language_model``."""
    found: dict[str, Any] = {}
    for name, module in causal_of(model).named_modules():
        path = canonical(name.replace(".base_layer", ""))
        if isinstance(module, ModulesToSaveWrapper):
            original = module.original_module.named_parameters(recurse=False)
            found |= {f"{path}.{parameter}": module for parameter, _ in original}
        elif isinstance(module, TrainableTokensLayer):
            found[f"{path.removesuffix('.token_adapter')}.weight"] = module
        elif isinstance(module, BaseTunerLayer):
            found[f"{path}.{getattr(module, 'parameter_name', 'weight')}"] = module
    return found


@torch.no_grad()
def put_adapter(model: Any, adapter: Adapter, loaded: Architecture, name: str = "default") -> None:
    """Give an adapter of a model the values of one that was saved; it must be beside the same weights.

    Args:
        model: of :func:`add_lora`, with a config that was made of the saved adapter.
        adapter: the saved one.
        loaded: the architecture as it is loaded.
        name: of the model's.

    Raises:
        CheckpointError: it is of another base.
    """
    layers = _layers(model)
    for entry in adapter.beside(loaded):
        layer = layers[entry.name]
        of_embedding = entry.weight.kind == "embedding"
        for part, stored in entry.tensors.items():
            if part == "copy":
                held = getattr(layer.modules_to_save[name], entry.weight.parameter)
            elif part == "rows":
                held = layer.trainable_tokens_delta[name]
            elif part == "magnitude":
                held = layer.lora_magnitude_vector[name].weight
            elif of_embedding:
                held = (layer.lora_embedding_A if part == "a" else layer.lora_embedding_B)[name]
            else:
                held = (layer.lora_A if part == "a" else layer.lora_B)[name].weight
            read = adapter.read(stored)
            if held.is_meta:
                torch.utils.swap_tensors(held, torch.nn.Parameter(read.float(), requires_grad=False))
            else:
                held.copy_(read.view(held.shape))


def require_reached(model: Any, trained: tuple[TrainedWeight, ...]) -> None:
    """Refuse an adapter that reaches other weights than its plan says, or none.

    Raises:
        SpecError: such.
    """
    planned = sum(entry.parameters for entry in trained)
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


def unwrapped(name: str) -> str:
    """The name of a weight, or of what is beside or instead of one, without what peft wraps it in."""
    return _WRAPPERS.sub("", name)


def adapter_of(model: Any, *, text_only_names: bool) -> tuple[peft.LoraConfig, dict[str, torch.Tensor]]:
    """A peft model's adapter as its files are to hold it: beside the original weights.

    A pair that was taken out of the weight is put beside the trained one with its sign changed: with W = R + B0 A0
    it is R + B A = W + [B, -B0] [A; A0] (peft, LoraModel.subtract_mutated_init), at twice the rank.

    Args:
        model: of :func:`add_lora`.
        text_only_names: under the names of ``...ForCausalLM``, whichever class is loaded; else under those of
            ``...ForConditionalGeneration``. An adapter that is saved under the former loads as nothing, without an
            error, wherever the class is served that the checkpoint is published as.

    Returns:
        The configuration, a copy, and the tensors by name.
    """
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    layers = {name: module for name, module in model.named_modules() if getattr(module, "taken_out", None)}
    for name, module in layers.items():
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        tensors[a] = torch.cat([tensors[a], module.taken_out[0]])
        tensors[b] = torch.cat([tensors[b], -module.taken_out[1]], dim=1)
    if layers:
        growth = 2**0.5 if config.use_rslora else 2  # of alpha, so that its quotient stays
        config.init_lora_weights = True
        config.r, config.lora_alpha = 2 * config.r, growth * config.lora_alpha
        config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
        config.alpha_pattern = {key: growth * alpha for key, alpha in config.alpha_pattern.items()}
    rename = _of_text_alone if text_only_names else _of_vision_language
    return config, {rename(name): whole(tensor.detach()) for name, tensor in tensors.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that processes share, gathered in host memory: all of them must ask. Others are as they are."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather().cpu()


def stored_adapter(model: Any) -> Adapter:
    """A peft model's adapter, to be merged.

    Raises:
        CheckpointError: its update is more than its pairs.
    """
    config, tensors = adapter_of(model, text_only_names=True)
    values = json.loads(json.dumps(config.to_dict(), default=list))
    require_lora(values, "the model's adapter")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Adapter(values, shapes, tensors.__getitem__, "the model's adapter")


def write_adapter(config: peft.LoraConfig, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write what :func:`adapter_of` gives into an empty folder, as peft's two files."""
    # A head that is the embedding is written by its own name too: a file holds no two names of one tensor.
    held = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(held, folder / TENSORS, metadata={"format": "pt"})
    config.save_pretrained(folder)


def _of_vision_language(name: str) -> str:
    is_alone = name.startswith(_TEXT_ALONE) and not name.startswith((_IN_VISION_LANGUAGE, _VISION))
    return name.replace(_TEXT_ALONE, _IN_VISION_LANGUAGE, 1) if is_alone else name


def _of_text_alone(name: str) -> str:
    return name.replace(_IN_VISION_LANGUAGE, _TEXT_ALONE, 1)
