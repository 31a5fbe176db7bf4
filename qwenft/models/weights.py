"""The tensors of a checkpoint's files, by the names that parameters have in memory.

A plan looks at their names through this file, and so it loads no torch until a tensor is read.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from qwenft.errors import CheckpointError
from qwenft.family.inventory import inventory
from qwenft.models.checkpoint import INDEX, quantization_of, weight_files
from qwenft.plan.storage import Storage

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from qwenft.family.architectures import Architecture
    from qwenft.family.inventory import Weight
    from qwenft.specs.model import ModelSpec

#: What bitsandbytes saves beside a packed weight.
NF4_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
#: Elements of a block of rows: 128 MiB in float32.
_BLOCK = 2**25
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def canonical(name: str) -> str:
    """A name without ``language_model``, which some files and classes have and others have not."""
    return name.replace("model.language_model.", "model.", 1)


def expert_part(name: str) -> tuple[str, int, str] | None:
    """Of one expert's tensor in a file: the stack that holds it in memory, its number, and "gate", "up" or "down".

    None for any other tensor.
    """
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    stack, number, part = match.groups()
    return f"{stack}.{'down' if part == 'down' else 'gate_up'}_proj", int(number), part


def is_quantization_state(name: str) -> bool:
    """Whether a tensor of a file belongs to a quantized weight, and is none itself."""
    return name.endswith((*(f".{part}" for part in NF4_PARTS), ".SCB", ".weight_format"))


class Weights:
    """The tensors of a checkpoint; each is read by itself, and nothing of it stays behind when it is dropped.

    Args:
        folder: the checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is there twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = weight_files(folder)
        self._places: dict[str, tuple[Path, str]] = {}
        for file in self.files:
            with self._open(file) as tensors:
                stored = list(tensors.keys())
            found = {canonical(name): (file, name) for name in stored}
            twice = self._places.keys() & found.keys()
            if twice or len(found) < len(stored):
                raise CheckpointError(
                    f"{folder}: {file.name} holds {min(twice, default='a tensor')} a second time: which of "
                    "them is meant cannot be told",
                    fix="copy the checkpoint again",
                    path=folder,
                )
            self._places |= found

    def __contains__(self, name: str) -> bool:
        """Whether a file has it as one tensor."""
        return canonical(name) in self._places

    def stored_names(self) -> Iterator[tuple[str, str]]:
        """The names of all tensors, without ``language_model``, and as they are in the files."""
        return ((name, stored) for name, (_, stored) in self._places.items())

    def of_file(self, file: Path) -> Iterator[tuple[str, str]]:
        """The names of the tensors of one file, likewise."""
        return ((name, stored) for name, (place, stored) in self._places.items() if place == file)

    def entry(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The dtype, as the file names it, and the shape of a tensor; nothing of it is read."""
        file, stored = self._places[canonical(name)]
        with self._open(file) as tensors:
            part = tensors.get_slice(stored)
            return part.get_dtype(), tuple(part.get_shape())

    def dtype_of(self, name: str) -> str:
        """The dtype of a parameter, or of the first part of a stack, as its file names it."""
        part = name if name in self else _parts(name, 1)[0]
        return self.entry(part)[0]

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the files have a parameter, as one tensor or, of a stack of experts, in parts."""
        return name in self or (len(shape) == 3 and all(part in self for part in _parts(name, shape[0])))

    def read(self, name: str) -> torch.Tensor:
        """One tensor; pages of the file that are not used yet are not in memory."""
        file, stored = self._places[canonical(name)]
        with self._open(file) as tensors:
            tensor: torch.Tensor = tensors.get_tensor(stored)
            return tensor

    def blocks(self, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """One tensor in blocks of rows, of at most `_BLOCK` elements, or a row, each."""
        _, shape = self.entry(name)
        height = max(1, _BLOCK // max(1, math.prod(shape[1:])))
        if not shape or shape[0] <= height:
            yield slice(None), self.read(name)
            return
        for start in range(0, shape[0], height):
            rows = slice(start, min(start + height, shape[0]))
            yield rows, self.rows(name, rows)

    def rows(self, name: str, rows: slice) -> torch.Tensor:
        """Some rows of a tensor."""
        file, stored = self._places[canonical(name)]
        # Opened anew for every block: pages of what was read before stay with an open file.
        with self._open(file) as tensors:
            read: torch.Tensor = tensors.get_slice(stored)[rows]
            return read

    def experts(self, name: str, count: int, wanted: slice = slice(None)) -> Iterator[torch.Tensor]:
        """The wanted experts [O, I] of a stack of ``count``, one after the other, however the files hold them."""
        numbers = range(count)[wanted]
        if name in self:
            for expert in numbers:
                found = self.rows(name, slice(expert, expert + 1))
                yield found[0] if len(found) else found  # of fewer experts, for the shape to be refused
        else:
            import torch

            parts = _parts(name, count)
            for expert in numbers:
                of_expert = parts[expert * len(parts) // count : (expert + 1) * len(parts) // count]
                read = [self.read(part) for part in of_expert]
                yield torch.cat(read) if len(read) > 1 else read[0]

    @contextmanager
    def _open(self, file: Path) -> Iterator[Any]:
        try:
            with safe_open(file, framework="pt") as tensors:
                yield tensors
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.folder}: a weight file is damaged or missing: {file.name}: {error}",
                fix="copy the checkpoint again",
                path=self.folder,
            ) from error


def _parts(stack: str, count: int) -> list[str]:
    """The names under which files hold the experts of a stack each alone, those of one expert together."""
    module, _, name = stack.rpartition(".")
    halves = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
    return [f"{module}.{expert}.{half}.weight" for expert in range(count) for half in halves]


def write_index(folder: Path, places: dict[str, str]) -> None:
    """Write which tensor is in which file."""
    total = sum((folder / file).stat().st_size for file in set(places.values()))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def checked(weights: Weights, name: str, read: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that was read, in the shape that the config.json gives it, of 16 or 32 bits.

    Raises:
        CheckpointError: it is none such.
    """
    if not read.dtype.is_floating_point or read.dtype.itemsize not in (2, 4):
        raise CheckpointError(
            f"{weights.folder}: {name} is held in {read.dtype}; expected 16 or 32 bits, or a quantization state "
            "that says how it is held",
            fix='the checkpoint that it was made of, with .quantize("nf4")',
            path=weights.folder,
        )
    if tuple(read.shape) != shape:
        raise CheckpointError(
            f"{weights.folder}: {name} has the shape {tuple(read.shape)}, and its config.json makes it {shape}",
            fix="copy the checkpoint again, with its own config.json",
            path=weights.folder,
        )
    return read


def require_whole(weights: Weights, loaded: Architecture) -> None:
    """Refuse files that lack a weight of the model.

    Raises:
        CheckpointError: such.
    """
    missing = [
        name
        for weight in inventory(loaded)
        for name in weight.names(text_only=loaded.is_text_only)
        if not weights.holds(name, weight.shape)
    ]
    if missing:
        raise CheckpointError(
            f"{weights.folder}: {len(missing)} weights are in none of its {len(weights.files)} files, "
            f"{missing[0]} first",
            fix="a checkpoint that is whole",
            path=weights.folder,
            missing=missing,
        )


def scales_name(weight: Weight, name: str) -> str:
    """Where a file has the scales of a weight in int8: beside a Linear's weight, below a stack's name."""
    return f"{name}.SCB" if weight.kind == "experts" else f"{name.removesuffix('.weight')}.SCB"


def storage_of(model: ModelSpec, loaded: Architecture) -> Storage:
    """How the weights of a model are held: as its spec asks, or as the checkpoint's files hold them quantized.

    Raises:
        CheckpointError: they are quantized in a format that is not trained on.
    """
    config = quantization_of(model)
    if config is None:
        return Storage.of(model, loaded)
    kind = _stored_kind(config, model.source)
    if not Path(model.source).is_dir():
        raise CheckpointError(
            f"{model.source!r} is quantized already; which of its weights, its files say, and they are not here",
            fix=f"hf download {model.source}, and ModelSpec with the folder that it prints",
            path=model.source,
        )
    weights = Weights(Path(model.source))
    names, double_quant = set(), False
    for weight in inventory(loaded):
        for name in weight.names(text_only=loaded.is_text_only):
            if (scales_name(weight, name) if kind == "int8" else f"{name}.absmax") in weights:
                names.add(name)
                double_quant |= f"{name}.nested_absmax" in weights
    return Storage(model.dtype, kind, double_quant, frozenset(names), stored=True)


def _stored_kind(config: dict[str, Any], source: str) -> str:
    """The format that a quantization_config names: "nf4" or "int8"."""
    method = str(config.get("quant_method", "unknown"))
    if method == "bitsandbytes":
        if config.get("load_in_8bit"):
            return "int8"
        method = f"bitsandbytes {config.get('bnb_4bit_quant_type', 'fp4')}"
        if method == "bitsandbytes nf4":
            return "nf4"
    raise CheckpointError(
        f"{source} is quantized already, by {method}; qwenft trains beside weights of 16 or 32 bits, and beside "
        "nf4 and int8 of bitsandbytes",
        fix='the checkpoint that it was made of, with .quantize("nf4")',
        path=source,
        got=method,
    )
