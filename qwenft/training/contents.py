"""What a checkpoint of a run may hold: looked at before anything of it is used, for it may be from somebody else.

A sha256 in a manifest shows what was damaged, and nothing of who wrote both.
"""

from __future__ import annotations

import math
import re
import stat
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim.lr_scheduler import LambdaLR

from qwenft.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch.distributed.checkpoint.metadata import Metadata

    #: Shape and dtype of tensors, by name.
    Entries = Mapping[str, tuple[torch.Size, torch.dtype]]

_FILE = re.compile(r"(model|optimizer|random)(-\d{5}-of-\d{5})?\.safetensors")
_MANIFEST_BYTES = 2**28
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIX = "remove it, and continue from a checkpoint that you made yourself"


def require_plain(path: Path, manifest: str) -> None:
    """Refuse a folder, or a manifest in it, that is a link or no file that can be read at once.

    Raises:
        CheckpointError: such.
    """
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link to {path.resolve()}", fix=f"{path.resolve()} itself", path=path)
    file = path / manifest
    try:
        found = file.lstat()
    except OSError:
        return  # for the reader to say
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{file} is no plain file", fix=_FIX, path=path)
    if found.st_size > _MANIFEST_BYTES:
        problem = f"{file} has {found.st_size:,} bytes, and more than {_MANIFEST_BYTES:,} are not read"
        raise CheckpointError(problem, fix=_FIX, path=path)


def require_contents(path: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest of other values than are written there, and files that are linked, elsewhere or not in it.

    Raises:
        CheckpointError: such.
    """
    files = manifest["files"]
    odd = [name for name in files if not _FILE.fullmatch(name)] if isinstance(files, dict) else []
    if odd:
        problem = (
            f"{path}: its manifest names {odd[0]!r:.200}; expected files beside it, such as model.safetensors"
        )
        raise CheckpointError(problem, fix=_FIX, path=path)
    for name, (accepts, expected) in _VALUES.items():
        if not accepts(manifest.get(name)):
            problem = f"{path}: its manifest has {name} = {manifest.get(name)!r:.200}; expected {expected}"
            raise CheckpointError(problem, fix=_FIX, path=path)
    for file in (path / name for name in files):
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise CheckpointError(f"{file} is no plain file", fix=_FIX, path=path)
    # Torch's reader would read them too.
    for file in path.glob("*.safetensors"):
        if file.name not in files:
            raise CheckpointError(f"{path}: holds {file.name}, which its manifest has not", fix=_FIX, path=path)


def require_whole(path: Path, metadata: Metadata) -> None:
    """Refuse tensors whose parts leave something of them out, which would be filled with what memory holds.

    Raises:
        CheckpointError: such.
    """
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        held = sum(math.prod(part.sizes) for part in tensor.chunks)
        if held != math.prod(tensor.size) or any(start < 0 for part in tensor.chunks for start in part.offsets):
            problem = f"{path}: {name} of {tuple(tensor.size)} is held in parts of {held:,} elements"
            raise CheckpointError(problem, fix=_FIX, path=path)


def require_states(path: Path, found: Mapping[str, Entries]) -> None:
    """Refuse moments that are not of the weights beside them, and random states that are none.

    Raises:
        CheckpointError: such.
    """
    _require_moments(path, found["optimizer"], found["model"])
    if found["random"] and "cpu" not in found["random"]:
        raise CheckpointError(f"{path}: holds no random state of the CPU", fix=_FIX, path=path)
    for file in path.glob("random*.safetensors"):
        try:
            with safe_open(file, framework="pt") as states:
                for name in states.keys():  # noqa: SIM118 - no mapping
                    if name.startswith("cpu"):
                        torch.Generator().set_state(states.get_tensor(name))
        except (OSError, SafetensorError, RuntimeError, TypeError) as error:
            problem = f"{file}: holds no random states of torch: {error}"
            raise CheckpointError(problem, fix=_FIX, path=path) from None


def _require_moments(path: Path, moments: Entries, weights: Entries) -> None:
    """A kernel of an optimizer believes that a moment has the shape of its weight, and reaches behind another."""
    for name, (shape, dtype) in moments.items():
        parameter, _, kind = name.partition(":")
        of, held_in = weights.get(parameter, (None, None))
        fits, may_be = shape == of, {torch.float32, held_in}
        if kind == "step":
            fits = shape.numel() == 1
        elif kind.startswith(("qmap", "absmax")):  # their optimizer has its own room for these
            fits = of is not None
        elif kind.startswith("state"):
            may_be |= {torch.uint8}
        if of is None or not fits or dtype not in may_be:
            problem = (
                f"{path}: {name} is of {tuple(shape)} {dtype}, beside a weight of {of and tuple(of)} {held_in}"
            )
            raise CheckpointError(problem, fix=_FIX, path=path)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_place(value: Any) -> bool:
    counts = ("epoch", "row", "read")
    return (
        isinstance(value, dict)
        and value.keys() == {*counts, "digest"}
        and all(_is_count(value[name]) for name in counts)
        and isinstance(value["digest"], str)
    )


def _are_numbers(values: Any) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)


def _is_schedule(value: Any) -> bool:
    """Whether it is the state of a LambdaLR, which makes attributes of all that it finds."""
    if not isinstance(value, dict) or not {"base_lrs", "_last_lr", "last_epoch", "lr_lambdas"} <= value.keys():
        return False
    rates = [value["base_lrs"], value["_last_lr"]]
    others = {name for name in value if name not in ("base_lrs", "_last_lr", "lr_lambdas")}
    return (
        all(isinstance(each, list) and _are_numbers(each) for each in rates)
        and isinstance(value["lr_lambdas"], list)
        and all(each is None for each in value["lr_lambdas"])
        and all(type(value[name]) in (int, bool) for name in others)
        and not any(name == "optimizer" or callable(getattr(LambdaLR, name, None)) for name in others)
    )


def _are_files(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"model", "random"} <= {name.partition(".")[0].partition("-")[0] for name in value}
        and all(isinstance(of_one, dict) and of_one.keys() == {"bytes", "sha256"} for of_one in value.values())
        and all(_is_count(of_one["bytes"]) for of_one in value.values())
        and all(_SHA256.fullmatch(str(of_one["sha256"])) for of_one in value.values())
    )


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_is_count, "a whole number of at least 0"),
    "ranks": (lambda value: _is_count(value) and value > 0, "a whole number of at least 1"),
    "next": (_is_place, "a place in the data"),
    "optimizer": (lambda value: isinstance(value, dict) and _are_numbers(value.values()), "numbers by name"),
    "schedule": (_is_schedule, "the state of a schedule"),
    "identity": (lambda value: isinstance(value, dict), "an object"),
    "files": (_are_files, "bytes and sha256 of model.safetensors and of what lies beside it"),
}
