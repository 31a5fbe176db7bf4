"""Weights in 4 and 8 bits through bitsandbytes: read, held, and kept as files that are read again."""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import torch
import transformers
from bitsandbytes import nn as bnb
from bitsandbytes.functional import QuantState
from safetensors.torch import save_file

from qwenft.errors import CheckpointError
from qwenft.family.inventory import inventory
from qwenft.kernels.quantized import dense, dense_shape, held_in_int8, held_in_nf4, quantize, quantize_experts
from qwenft.models.checkpoint import INDEX
from qwenft.models.precision import cast_matmul
from qwenft.models.weights import (
    NF4_PARTS,
    Weights,
    canonical,
    checked,
    expert_part,
    require_whole,
    scales_name,
    write_index,
)
from qwenft.plan.storage import NESTED_BLOCK, NF4_BLOCK

if TYPE_CHECKING:
    from pathlib import Path

    from qwenft.family.architectures import Architecture
    from qwenft.family.inventory import Weight
    from qwenft.plan.storage import Storage

_SHARD = 2**30  # bytes


class _DenseProduct:
    """The product with the dense weight: bitsandbytes' own rounds activations (int8) or repacks weights (nf4)."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O]."""
        y = cast_matmul(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Linear4bit(_DenseProduct, bnb.Linear4bit):
    """A Linear whose weight is held in nf4."""


class Linear8bit(_DenseProduct, bnb.Linear8bitLt):
    """A Linear whose weight is held in int8."""


def read_quantized(weights: Weights, weight: Weight, name: str, storage: Storage, device: str) -> torch.Tensor:
    """Read one parameter and hold it in 4 or 8 bits.

    Args:
        weights: where it is read; quantized already, or now.
        weight: which kind of weight it is.
        name: its full name.
        storage: in which format.
        device: where it is to be held.

    Raises:
        CheckpointError: its shape is not that of the config.json, or its quantization state is not whole.
    """
    if storage.stored:
        return (_stored_int8 if storage.kind == "int8" else _stored_nf4)(weights, weight, name, device)
    assert storage.kind is not None
    if weight.kind == "experts":
        experts = (
            checked(weights, name, expert, weight.shape[1:]).to(device)
            for expert in weights.experts(name, weight.shape[0])
        )
        return quantize_experts(experts, weight.shape, storage.kind, double_quant=storage.double_quant)
    read = checked(weights, name, weights.read(name), weight.shape)
    return quantize(read.to(device), storage.kind, double_quant=storage.double_quant)


def quantized_on_meta(shape: tuple[int, ...], storage: Storage) -> torch.Tensor:
    """A parameter of bitsandbytes for a weight of this shape, which takes no memory and knows no scales yet."""
    if storage.kind == "int8":
        scales = torch.empty(shape[:-1], device="meta")
        return held_in_int8(torch.empty(shape, dtype=torch.int8, device="meta"), scales)
    packed = torch.empty((-(-math.prod(shape) // 2), 1), dtype=torch.uint8, device="meta")
    return bnb.Params4bit(
        packed,
        requires_grad=False,
        blocksize=NF4_BLOCK,
        compress_statistics=storage.double_quant,
        quant_type="nf4",
        bnb_quantized=True,
    )


def empty_scales(shape: tuple[int, ...], storage: Storage) -> Any:
    """What is kept beside a quantized weight, a ``QuantState`` or the scales of int8, with nothing in it."""
    if storage.kind == "int8":
        return torch.empty(shape[:-1])
    blocks = -(-math.prod(shape) // NF4_BLOCK)
    common: dict[str, Any] = {"quant_type": "nf4", "dtype": torch.float32, "shape": torch.Size(shape)}
    if not storage.double_quant:
        return QuantState(absmax=torch.empty(blocks), code=torch.empty(16), blocksize=NF4_BLOCK, **common)
    nested = QuantState(
        absmax=torch.empty(-(-blocks // NESTED_BLOCK)), code=torch.empty(256), blocksize=NESTED_BLOCK
    )
    scales = {"absmax": torch.empty(blocks, dtype=torch.uint8), "offset": torch.empty(()), "state2": nested}
    return QuantState(code=torch.empty(16), blocksize=NF4_BLOCK, **scales, **common)


def put_quantized(model: Any, name: str, held: torch.Tensor) -> None:
    """Give a model a quantized parameter; the Linear that has it becomes one of bitsandbytes."""
    path, _, parameter = name.rpartition(".")
    module = model.get_submodule(path)
    if not isinstance(module, torch.nn.Linear):
        setattr(module, parameter, held)
        return
    sizes, bias = (module.in_features, module.out_features), module.bias is not None
    linear: Any
    if isinstance(held, bnb.Params4bit):
        options: Any = {"compress_statistics": held.compress_statistics, "quant_type": held.quant_type}
        linear = Linear4bit(*sizes, bias=bias, device="meta", **options)
    else:
        linear = Linear8bit(*sizes, bias=bias, device="meta", has_fp16_weights=False)
    linear.weight = held
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, linear)


def _stored_int8(weights: Weights, weight: Weight, name: str, device: str) -> torch.Tensor:
    rows, scales = weights.read(name), weights.read(scales_name(weight, name))
    if rows.dtype != torch.int8 or rows.shape != weight.shape or scales.numel() * weight.shape[-1] != weight.size:
        raise _not_whole(weights, name, "int8")
    scales = scales.to(device, torch.float32, copy=True).view(weight.shape[:-1])
    return held_in_int8(rows.to(device, copy=True), scales)


def _stored_nf4(weights: Weights, weight: Weight, name: str, device: str) -> torch.Tensor:
    held = _read_nf4(weights, name, device)
    if dense_shape(held) != weight.shape:
        raise _not_whole(weights, name, "nf4")
    return held


def _read_nf4(weights: Weights, name: str, device: str) -> torch.Tensor:
    parts = {
        part: weights.read(f"{name}.{part}").to(device, copy=True)
        for part in NF4_PARTS
        if f"{name}.{part}" in weights
    }
    packed = weights.read(name)
    try:
        state = QuantState.from_dict(parts, device)
    except (KeyError, ValueError, AssertionError):
        raise _not_whole(weights, name, "nf4") from None
    size = math.prod(state.shape)
    scales = (state.absmax.numel(), torch.uint8 if state.nested else torch.float32)
    if (*scales, packed.numel()) != (-(-size // state.blocksize), state.absmax.dtype, -(-size // 2)):
        raise _not_whole(weights, name, "nf4")
    return held_in_nf4(packed.to(device, copy=True), state)


def stored_shape(weights: Weights, name: str) -> tuple[int, ...] | None:
    """The shape of a weight that the files hold quantized; None of any other tensor."""
    if f"{name}.absmax" in weights:
        return tuple(dense_shape(_read_nf4(weights, name, "cpu")))
    return None if _int8_scales(weights, name) is None else weights.entry(name)[1]


def read_dense(weights: Weights, name: str) -> torch.Tensor:
    """A tensor of the files; in float32 where they hold it quantized."""
    if f"{name}.absmax" in weights:
        return dense(_read_nf4(weights, name, "cpu"), torch.float32)
    scales = _int8_scales(weights, name)
    read = weights.read(name)
    return read if scales is None else dense(held_in_int8(read, weights.read(scales)), torch.float32)


def _int8_scales(weights: Weights, name: str) -> str | None:
    """The name of the scales of a weight in int8; None of any other tensor, numbers of 8 bits among them."""
    beside = (f"{name}.SCB", f"{name.removesuffix('.weight')}.SCB")
    return next((scales for scales in beside if scales in weights and weights.entry(name)[0] == "I8"), None)


def _not_whole(weights: Weights, name: str, kind: str) -> CheckpointError:
    return CheckpointError(
        f"{weights.folder}: {name} is held in {kind}, and its quantization state is missing or of another weight",
        fix='the checkpoint that it was made of, with .quantize("nf4")',
        path=weights.folder,
    )


def _as_tensors(weight: Weight, name: str, held: torch.Tensor) -> dict[str, torch.Tensor]:
    """A quantized parameter as a file holds it: bitsandbytes' own names for a Linear, and such for a stack."""
    if getattr(held, "quant_state", None) is None:
        scales: torch.Tensor = held.SCB  # type: ignore[attr-defined]
        return {name: held.data, scales_name(weight, name): scales}
    state: dict[str, torch.Tensor] = held.quant_state.as_dict(packed=True)  # type: ignore[attr-defined]
    return {name: held.data, **{f"{name}.{part}": tensor for part, tensor in state.items()}}


def write_quantized(source: Path, folder: Path, checkpoint: Architecture, storage: Storage) -> None:
    """Write a whole checkpoint with its weights quantized into an empty folder; all else is copied.

    Weights are quantized one by one; a file takes at most a GiB, or one tensor.

    Args:
        source: the checkpoint, not quantized.
        folder: exists.
        checkpoint: the whole checkpoint's architecture.
        storage: what is quantized, by its names in it.
    """
    weights = Weights(source)
    require_whole(weights, checkpoint)
    shards = _Shards(folder)
    done: set[str] = set()
    for weight in inventory(checkpoint):
        for name in weight.names(text_only=checkpoint.is_text_only):
            if storage.is_quantized(weight, name):
                shards.add(_as_tensors(weight, name, read_quantized(weights, weight, name, storage, "cpu")))
                done.add(canonical(name))
    for name, stored in weights.stored_names():
        part = expert_part(name)
        if (part[0] if part else name) not in done:
            shards.add({stored: weights.read(name)})
    shards.finish()
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != INDEX:
            shutil.copy2(file, folder / file.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _bitsandbytes_config(storage)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _bitsandbytes_config(storage: Storage) -> dict[str, Any]:
    """What transformers reads: without ``experts``, of which it knows nothing."""
    skipped = ["lm_head", "in_proj_a", "in_proj_b", "shared_expert_gate"]
    if not any(".visual." in name for name in storage.names):
        skipped.append("model.visual")
    options: dict[str, Any] = {"load_in_8bit": True}
    if storage.kind == "nf4":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": storage.double_quant,
            "bnb_4bit_compute_dtype": "bfloat16",
        }
    found: dict[str, Any] = transformers.BitsAndBytesConfig(**options, llm_int8_skip_modules=skipped).to_dict()
    return found


class _Shards:
    """Files of tensors, written as soon as they are full, and named when it is known how many there are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, torch.Tensor] = {}
        self._written: list[list[str]] = []

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Tensors that belong into one file."""
        size = _bytes(tensors)
        if self._tensors and _bytes(self._tensors) + size > _SHARD:
            self._write()
        self._tensors |= tensors

    def finish(self) -> None:
        """Write what is left, and the index."""
        self._write()
        count = len(self._written)
        places: dict[str, str] = {}
        for number, names in enumerate(self._written):
            file = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._file(number).rename(self._folder / file)
            places |= dict.fromkeys(names, file)
        write_index(self._folder, places)

    def _write(self) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors.items()}
        save_file(tensors, self._file(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(tensors))
        self._tensors = {}

    def _file(self, number: int) -> Path:
        return self._folder / f"shard-{number}.safetensors"


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
