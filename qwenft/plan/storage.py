"""How each weight of a model is held in memory, and what that takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs

from qwenft.family.inventory import inventory, parted

if TYPE_CHECKING:
    from qwenft.family.architectures import Architecture
    from qwenft.family.inventory import Weight
    from qwenft.specs.model import ModelSpec, Quantization

ITEM_BYTES = {"bfloat16": 2, "float32": 4}
#: Weights that share a scale in nf4, and scales that share one of their own (bitsandbytes 0.50, functional.py).
NF4_BLOCK, NESTED_BLOCK = 64, 256
_FLOAT32 = 4
# Gates are thin and decide a lot; the head's logits are what is trained on; tokens are looked up, not multiplied.
_NEVER = frozenset({"linear_attention_gates", "router", "embeddings", "lm_head", "norms"})
_VISION = frozenset({"vision", "vision_merger"})


@attrs.frozen
class Storage:
    """How weights are held.

    Args:
        dtype: of those that are not quantized, the float32 ones apart.
        kind: "nf4", "int8", or None where none is quantized.
        double_quant: the scales of nf4 are quantized too.
        names: full names of the parameters that are quantized.
        stored: they are so in the checkpoint's files already.
    """

    dtype: str
    kind: str | None = None
    double_quant: bool = False
    names: frozenset[str] = attrs.field(default=frozenset(), repr=False)
    stored: bool = False

    @classmethod
    def of(cls, model: ModelSpec, loaded: Architecture) -> Storage:
        """What a spec asks for, of the part of a checkpoint that is loaded."""
        asked = model.quantization
        if asked is None:
            return cls(model.dtype)
        names = frozenset(
            name
            for weight in inventory(loaded)
            if is_quantizable(weight, asked)
            for name in weight.names(text_only=loaded.is_text_only)
        )
        return cls(model.dtype, asked.kind, asked.double_quant, names)

    def is_quantized(self, weight: Weight, name: str) -> bool:
        """Whether a parameter is held in 4 or 8 bits."""
        return weight.kind in ("linear", "experts") and name in self.names

    def dtype_of(self, weight: Weight) -> str:
        """The dtype of a weight that is not quantized."""
        return "float32" if weight.is_float32 else self.dtype

    def is_whole(self, weight: Weight) -> bool:
        """Whether every process holds all of a weight where others are shared out: small, and of another dtype."""
        return weight.is_float32 and self.dtype != "float32"

    def process_bytes(self, weight: Weight, *, text_only: bool, shards: int) -> tuple[int, int]:
        """Bytes over all layers in one of the processes that share weights out.

        Returns:
            Its part of what is shared out, and what is whole in each: float32 weights beside others, and scales.
        """
        part = whole = 0
        for held_in, count in self.bytes_of(weight, text_only=text_only).items():
            shared = 0 if self.is_whole(weight) else count
            if held_in in ("nf4", "int8"):
                each = quantized_bytes(weight.shape, held_in, double_quant=self.double_quant)
                shared = count // each * packed_bytes(weight.shape, held_in)
            part += -(-shared // shards)
            whole += count - shared
        return part, whole

    def bytes_of(self, weight: Weight, *, text_only: bool) -> dict[str, int]:
        """Bytes over all layers, by the format that they are held in."""
        found: dict[str, int] = {}
        names = weight.names(text_only=text_only)
        quantized = sum(self.is_quantized(weight, name) for name in names)
        if quantized and self.kind is not None:
            found[self.kind] = quantized * quantized_bytes(weight.shape, self.kind, double_quant=self.double_quant)
        if quantized < len(names):
            dtype = self.dtype_of(weight)
            found[dtype] = (len(names) - quantized) * weight.size * ITEM_BYTES[dtype]
        return found


@attrs.frozen
class StorageRow:
    """What the weights of one role take, in one format.

    Args:
        role: the role.
        held_in: "nf4", "int8", "bfloat16" or "float32".
        bytes: where the model computes, or on the host.
    """

    role: str
    held_in: str
    bytes: int


def storage_rows(
    loaded: Architecture, storage: Storage, masters: tuple[Weight, ...] = ()
) -> tuple[StorageRow, ...]:
    """The bytes of each role in each format that it is held in, in the order of the model.

    Args:
        loaded: the model.
        storage: how its weights are held.
        masters: weights that are held in float32 instead, as they are trained.
    """
    totals: dict[tuple[str, str], int] = {}
    for weight in inventory(loaded):
        for part, held in zip(parted(weight, masters), (storage, Storage("float32")), strict=True):
            for held_in, count in (held.bytes_of(part, text_only=loaded.is_text_only) if part else {}).items():
                totals[weight.role, held_in] = totals.get((weight.role, held_in), 0) + count
    return tuple(StorageRow(role, held_in, count) for (role, held_in), count in totals.items())


def is_quantizable(weight: Weight, asked: Quantization) -> bool:
    """Whether a weight is among those that are quantized: matrices that most of the products are made with."""
    if weight.kind not in ("linear", "experts") or weight.role in _NEVER:
        return False
    if weight.kind == "experts":
        return asked.experts
    return asked.vision or weight.role not in _VISION


def packed_bytes(shape: tuple[int, ...], kind: str) -> int:
    """What the numbers of a weight in 4 or 8 bits take, without their scales."""
    size = math.prod(shape)
    return size if kind == "int8" else -(-size // 2)


def quantized_bytes(shape: tuple[int, ...], kind: str, *, double_quant: bool) -> int:
    """What bitsandbytes takes for a weight; tables that all share are not counted (64 bytes, and 1 KiB)."""
    packed = packed_bytes(shape, kind)
    if kind == "int8":
        return packed + _FLOAT32 * math.prod(shape[:-1])
    blocks = -(-math.prod(shape) // NF4_BLOCK)
    scales = blocks + _FLOAT32 * (-(-blocks // NESTED_BLOCK) + 1) if double_quant else _FLOAT32 * blocks
    return packed + scales
