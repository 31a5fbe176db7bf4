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
from qwenft.models.safetensors_file import TensorFile, as_bytes
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


#: Makes a trained tensor of the source's, or of a part of it.
_Reader = Callable[[torch.Tensor, _Part], torch.Tensor]


def write_merged(model: Any, source: Path, folder: Path, *, tied: bool, dequantized: bool) -> None:
    """Write a whole checkpoint into an empty folder: what was learned merged in, all other tensors copied.

    Tensors keep the dtype that the source stores them in, and sums are made in float32; towers that were not
    loaded are copied, and ``mtp.*`` unless it was trained. What the source holds quantized is written in the dtype
    of its embeddings. What was written is read again and compared, to the bit.

    Args:
        model: trained, with or without LoRA; it is left as it is.
        source: the folder of the base checkpoint.
        folder: exists.
        tied: the output head is the embedding.
        dequantized: merge into the weights that the run computed with, where these are quantized.

    Raises:
        CheckpointError: a trained tensor has no place in the source, or one reads otherwise than it was written.
    """
    merge = _Merge(Weights(source), dict(_learned(model)), dict(_quantized(model)) if dequantized else {}, tied)
    for file in merge.weights.files:
        with TensorFile(folder / file.name, merge.announced(file), {"format": "pt"}) as written:
            for stored, tensor in merge.tensors(file):
                written.write(stored, tensor)
    left = sorted(set(merge.learned) - merge.placed)
    if left:
        raise CheckpointError(f"{source}: no place for the trained tensor {left[0]}", path=source, missing=left)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy2(file, folder / file.name)
    _forget_quantization(folder)
    _check_written(merge, Weights(folder))


def _check_written(merge: _Merge, written: Weights) -> None:
    """Compare every tensor with what it is to be."""
    for file in merge.weights.files:
        announced = merge.announced(file)
        if {
            stored: written.entry(name) for name, stored in written.of_file(written.folder / file.name)
        } != announced:
            raise CheckpointError(f"{file.name} holds other tensors than were written", path=written.folder)
        for stored, tensor in merge.tensors(file):
            found = written.read(stored)
            if not torch.equal(as_bytes(found), as_bytes(tensor.to("cpu", found.dtype))):
                raise CheckpointError(
                    f"{stored} in {file.name} reads otherwise than it was written",
                    fix="another disk; what was learned is in the run's checkpoints and adapter as it was",
                    path=written.folder,
                )


@attrs.define(eq=False)
class _Merge:
    """The tensors of an export, made one by one.

    Args:
        weights: of the source.
        learned: what makes a trained tensor of the source's, by its name in memory.
        computed: what gives a tensor that the run holds quantized, where it is merged into that.
        tied: the output head is the embedding.
        placed: the names of ``learned`` that were met.
    """

    weights: Weights
    learned: dict[str, _Reader]
    computed: dict[str, Callable[[_Part], torch.Tensor]]
    tied: bool
    placed: set[str] = attrs.field(factory=set)

    def announced(self, file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The dtype and shape of every tensor of a file."""
        dense_dtype, _ = self.weights.entry("model.embed_tokens.weight")
        found = {}
        for stored, name in self._names(file):
            shape = stored_shape(self.weights, name)
            found[stored] = self.weights.entry(name) if shape is None else (dense_dtype, shape)
        return found

    def tensors(self, file: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of a file, in the dtype in which it was made."""
        for stored, name in self._names(file):
            key, part = _origin(name, tied=self.tied)
            tensor = self.computed[key](part) if key in self.computed else read_dense(self.weights, name)
            if key in self.learned:
                self.placed.add(key)
                tensor = self.learned[key](tensor, part)
            yield stored, tensor

    def _names(self, file: Path) -> Iterator[tuple[str, str]]:
        of_file = self.weights.of_file(file)
        return ((stored, name) for name, stored in of_file if not is_quantization_state(stored))


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
