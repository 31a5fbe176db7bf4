"""A safetensors file that is written tensor by tensor, in blocks, so that no more than one of them is in memory.

The format is that of https://github.com/huggingface/safetensors: eight bytes with the length of a JSON header, the
header with dtype, shape and place of every tensor, and the tensors one behind the other.
"""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ALIGNED = 8


class TensorFile:
    """A file that is being written; every tensor is given once, in the order in which they were announced.

    Args:
        path: of a new file.
        announced: (dtype, as a safetensors file names it, and shape) of every tensor, by name.
        metadata: strings of the header.
    """

    def __init__(
        self, path: Path, announced: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": metadata}
        place = 0
        for name, (dtype, shape) in announced.items():
            size = math.prod(shape) * _bytes(dtype)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
            place += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNED)
        self._left = {name: entry for name, entry in header.items() if name != "__metadata__"}
        self._file = path.open("xb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, blocks: Iterable[torch.Tensor]) -> None:
        """Add the next tensor, in blocks of its rows, in the dtype that was announced."""
        assert name == next(iter(self._left))
        entry = self._left.pop(name)
        start, end = entry["data_offsets"]
        for block in blocks:
            held = block.detach().to("cpu", _DTYPES.get(entry["dtype"], block.dtype))
            assert list(held.shape[1:]) == entry["shape"][1:], name
            start += self._file.write(as_bytes(held).numpy().data)
        assert start == end, name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        assert kind is not None or not self._left, f"{len(self._left)} announced tensors were not given"


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, in the order of its elements."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _bytes(dtype: str) -> int:
    """The bytes of an element of F32, BF16, I64, U8, F8_E4M3 and the like; BOOL takes one."""
    digits = "".join(character for character in dtype.partition("_")[0] if character.isdigit())
    return int(digits) // 8 if digits else 1
