"""The original checkpoint with what was learned: every other tensor and file as it was."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file

from qwenft.errors import CheckpointError
from qwenft.models.bind import causal_of
from qwenft.models.checkpoint import weight_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def write_merged(model: Any, source: Path, folder: Path, *, tied: bool) -> None:
    """Write a whole checkpoint into an empty folder: trained tensors replaced, all others copied.

    Tensors keep the dtype that the source stores them in; towers that were not loaded and `mtp.*` are copied.

    Args:
        model: trained, with or without LoRA; it is left as it is.
        source: the folder of the base checkpoint.
        folder: exists.
        tied: the output head is the embedding.

    Raises:
        CheckpointError: a trained tensor has no place in the source.
    """
    learned = dict(_learned(model))
    placed: set[str] = set()
    for file in weight_files(source):
        with safe_open(file, framework="pt") as tensors:
            merged = {}
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                key, select = _origin(_canonical(name), tied=tied)
                merged[name] = tensors.get_tensor(name)
                if key in learned:
                    placed.add(key)
                    merged[name] = select(learned[key]()).to(merged[name].dtype).contiguous()
            save_file(merged, folder / file.name, metadata={"format": "pt"})
    left = sorted(set(learned) - placed)
    if left:
        raise CheckpointError(f"{source}: no place for the trained tensor {left[0]}", path=source, missing=left)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy2(file, folder / file.name)


def _canonical(name: str) -> str:
    """A name without `language_model`, which some files and classes have and others have not."""
    return name.replace("model.language_model.", "model.", 1)


def _origin(name: str, *, tied: bool) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The name in memory of what a tensor of the file is, or is a part of, and how to take it from there."""
    if tied and name == "lm_head.weight":  # some files repeat a tied head
        return "model.embed_tokens.weight", torch.clone  # a file holds no two views of one storage
    match = _EXPERT.fullmatch(name)
    if match is None:
        return name, lambda tensor: tensor
    stack, number, part = match[1], int(match[2]), match[3]
    if part == "down":
        return f"{stack}.down_proj", lambda tensor: tensor[number]
    half = ("gate", "up").index(part)
    return f"{stack}.gate_up_proj", lambda tensor: tensor[number].chunk(2, dim=0)[half]


def _learned(model: Any) -> Iterator[tuple[str, Any]]:
    """Canonical name and a reader of every tensor that training changed."""
    base = causal_of(model)
    adapted = False
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            adapted = True
            parameter = getattr(module, "parameter_name", "weight")
            yield _canonical(f"{name.replace('.base_layer', '')}.{parameter}"), _merged_reader(module, parameter)
    if adapted:
        return
    for name, parameter in base.named_parameters():
        if parameter.requires_grad:
            yield _canonical(name), parameter.detach


def _merged_reader(module: Any, parameter: str) -> Any:
    """Reads the weight with the adapter's update added in float32, and leaves the module as it was."""

    def read() -> torch.Tensor:
        base = module.get_base_layer()
        held = getattr(base, parameter)
        original = held.data
        try:
            held.data = original.to(torch.float32, copy=True)  # merging adds in place
            module.merge()
            return getattr(module.get_base_layer(), parameter).data.clone()
        finally:
            module.merged_adapters.clear()
            held.data = original

    return read
