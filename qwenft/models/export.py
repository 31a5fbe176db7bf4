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

    from qwenft.family.architectures import Architecture

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def write_merged(model: Any, source: Path, folder: Path, checkpoint: Architecture, loaded: Architecture) -> None:
    """Write a whole checkpoint into an empty folder: trained tensors replaced, all others copied.

    Tensors keep the dtype that the source stores them in; towers that were not loaded and `mtp.*` are copied.

    Args:
        model: trained, with or without LoRA; it is left as it is.
        source: the folder of the base checkpoint.
        folder: exists.
        checkpoint: the whole checkpoint's architecture.
        loaded: the part of it that was loaded.

    Raises:
        CheckpointError: a trained tensor has no place in the source.
    """
    learned = dict(_learned(model, checkpoint, loaded))
    placed: set[str] = set()
    for file in weight_files(source):
        with safe_open(file, framework="pt") as tensors:
            merged = {}
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                key, select = _origin(name, learned)
                merged[name] = tensors.get_tensor(name)
                if key is not None:
                    placed.add(key)
                    merged[name] = select(learned[key]()).to(merged[name].dtype).contiguous()
            save_file(merged, folder / file.name, metadata={"format": "pt"})
    left = sorted(set(learned) - placed)
    if left:
        raise CheckpointError(f"{source}: no place for the trained tensor {left[0]}", path=source, missing=left)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy2(file, folder / file.name)


def _origin(name: str, learned: dict[str, Any]) -> tuple[str | None, Callable[[torch.Tensor], torch.Tensor]]:
    """The trained tensor that a tensor of the file is, or is a part of."""
    if name in learned:
        return name, lambda tensor: tensor
    if name == "lm_head.weight":  # some files repeat a tied head
        tied = "model.language_model.embed_tokens.weight"
        return (tied, lambda tensor: tensor) if tied in learned else (None, lambda tensor: tensor)
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None, lambda tensor: tensor
    stack, number, part = match[1], int(match[2]), match[3]
    key = f"{stack}.{'down_proj' if part == 'down' else 'gate_up_proj'}"
    half = {"gate": 0, "up": 1}.get(part)
    if key not in learned:
        return None, lambda tensor: tensor
    if half is None:
        return key, lambda tensor: tensor[number]
    return key, lambda tensor: tensor[number].chunk(2, dim=0)[half]


def _learned(model: Any, checkpoint: Architecture, loaded: Architecture) -> Iterator[tuple[str, Any]]:
    """Published name and a reader of every tensor that training changed."""
    base = causal_of(model)
    inserted = loaded.is_text_only and not checkpoint.is_text_only
    adapted = set()
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            parameter = getattr(module, "parameter_name", "weight")
            adapted.add(id(module))
            yield _published(_plain(name, parameter), inserted=inserted), _merged_reader(module, parameter)
    if adapted:
        return
    for name, parameter in base.named_parameters():
        if parameter.requires_grad:
            yield _published(name, inserted=inserted), parameter.detach


def _plain(module: str, parameter: str) -> str:
    return f"{module.replace('.base_layer', '')}.{parameter}"


def _published(name: str, *, inserted: bool) -> str:
    if inserted and name.startswith("model."):
        return name.replace("model.", "model.language_model.", 1)
    return name


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
