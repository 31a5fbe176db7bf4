"""The original checkpoint with what was learned: every other tensor and file as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from qwenft.errors import CheckpointError
from qwenft.kernels.quantized import dense, dense_experts, is_quantized
from qwenft.models.bind import causal_of
from qwenft.models.checkpoint import INDEX
from qwenft.models.lora import ParamWrapper
from qwenft.models.quantize import read_dense, stored_shape
from qwenft.models.safetensors_file import TensorFile
from qwenft.models.weights import Weights, canonical, expert_part, is_quantization_state, write_index

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@attrs.frozen
class _Part:
    """Of a parameter in memory, what a tensor of a file is: all of it, an expert, or half of one."""

    expert: int | None = None
    half: int | None = None

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The part of a weight [E, O, ...]."""
        if self.expert is None:
            return weight
        one = weight[self.expert]
        return one if self.half is None else one.chunk(2, dim=0)[self.half]


def write_merged(model: Any, source: Path, folder: Path, *, tied: bool, dequantized: bool) -> None:
    """Write a whole checkpoint into an empty folder: what was learned merged in, all other tensors copied.

    Tensors keep the dtype that the source stores them in, and sums are made in float32; towers that were not
    loaded and ``mtp.*`` are copied. What the source holds quantized is written in the dtype of its embeddings.

    Args:
        model: trained, with or without LoRA; it is left as it is.
        source: the folder of the base checkpoint.
        folder: exists.
        tied: the output head is the embedding.
        dequantized: merge into the weights that the run computed with, where these are quantized.

    Raises:
        CheckpointError: a trained tensor has no place in the source.
    """
    learned = dict(_learned(model))
    computed = dict(_quantized(model)) if dequantized else {}
    placed: set[str] = set()
    weights = Weights(source)
    dtype, _ = weights.entry("model.embed_tokens.weight")  # of what the source holds quantized
    for file in weights.files:
        names = {stored: name for name, stored in weights.of_file(file) if not is_quantization_state(stored)}
        announced = {
            stored: weights.entry(name) if (shape := stored_shape(weights, name)) is None else (dtype, shape)
            for stored, name in names.items()
        }
        with TensorFile(folder / file.name, announced, {"format": "pt"}) as written:
            for stored, name in names.items():
                key, part = _origin(name, tied=tied)
                tensor = computed[key](part) if key in computed else read_dense(weights, name)
                if key in learned:
                    placed.add(key)
                    tensor = learned[key](tensor, part)
                written.write(stored, tensor)
    left = sorted(set(learned) - placed)
    if left:
        raise CheckpointError(f"{source}: no place for the trained tensor {left[0]}", path=source, missing=left)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy2(file, folder / file.name)
    _forget_quantization(folder)


def _origin(name: str, *, tied: bool) -> tuple[str, _Part]:
    """The parameter in memory that a tensor of the file is, or is a part of, and which part."""
    if tied and name == "lm_head.weight":  # some files repeat a tied head
        return "model.embed_tokens.weight", _Part()
    found = expert_part(name)
    if found is None:
        return name, _Part()
    stack, expert, part = found
    return stack, _Part(expert, None if part == "down" else ("gate", "up").index(part))


def _forget_quantization(folder: Path) -> None:
    """Take out of config and index what spoke of a quantized source."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.pop("quantization_config", None) is None:
        return
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        places = {name: file for name, file in index["weight_map"].items() if not is_quantization_state(name)}
        write_index(folder, places)


_Reader = Callable[[torch.Tensor, _Part], torch.Tensor]


def _learned(model: Any) -> Iterator[tuple[str, _Reader]]:
    """Canonical name of every parameter that training changed, and what makes it of a tensor of the source."""
    base = causal_of(model)
    adapted = False
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            adapted = True
            parameter = getattr(module, "parameter_name", "weight")
            key = canonical(f"{name.replace('.base_layer', '')}.{parameter}")
            of_experts = isinstance(module, ParamWrapper)
            yield key, _experts_reader(module) if of_experts else _merged_reader(module, parameter)
    if adapted:
        return
    for name, parameter in base.named_parameters():
        if parameter.requires_grad:
            yield canonical(name), _trained_reader(parameter.detach())


def _trained_reader(parameter: torch.Tensor) -> _Reader:
    return lambda _, part: part.of(parameter)


def _experts_reader(module: ParamWrapper) -> _Reader:
    """Adds the pairs of the experts that a tensor holds, in float32."""

    @torch.no_grad()
    def read(original: torch.Tensor, part: _Part) -> torch.Tensor:
        pair = module.pair()
        if pair is None:
            return original
        a, b = pair.a if part.expert is None else pair.a[part.expert], part.of(pair.b)
        return original.float() + pair.scaling * (b.float() @ a.float()).to(original.device)

    return read


def _merged_reader(module: Any, parameter: str) -> _Reader:
    """Lets peft add the adapter's update to the tensor, in float32, and leaves the module as it was."""

    def read(original: torch.Tensor, _: _Part) -> torch.Tensor:
        base = module.get_base_layer()
        held = getattr(base, parameter)
        try:
            # Merging adds in place.
            setattr(base, parameter, torch.nn.Parameter(original.to(held.device, torch.float32, copy=True)))
            if is_quantized(held):
                peft.tuners.lora.Linear.merge(module)  # its own would quantize what it merges
            else:
                module.merge()
            merged: torch.Tensor = getattr(module.get_base_layer(), parameter).data.clone()
            return merged
        finally:
            module.merged_adapters.clear()
            setattr(base, parameter, held)

    return read


def _quantized(model: Any) -> Iterator[tuple[str, Callable[[_Part], torch.Tensor]]]:
    """Canonical name of every quantized parameter, and what makes a part of it dense, in float32."""
    for name, parameter in causal_of(model).named_parameters():
        if is_quantized(parameter):
            yield canonical(name.replace(".base_layer", "")), _dense_reader(parameter)


def _dense_reader(parameter: torch.Tensor) -> Callable[[_Part], torch.Tensor]:
    def read(part: _Part) -> torch.Tensor:
        if part.expert is None:
            return dense(parameter, torch.float32)
        one = dense_experts(parameter, part.expert, part.expert + 1, torch.float32)
        return attrs.evolve(part, expert=0).of(one)

    return read
