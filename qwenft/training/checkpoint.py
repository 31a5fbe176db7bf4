"""The one checkpoint format: a folder of safetensors with a JSON manifest, and no pickle.

``manifest.json`` holds plain values, and the size and sha256 of every other file; ``NAME.safetensors`` holds
tensors. A folder takes its place when all of it is on the disk, so that what has a checkpoint's name is whole.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qwenft.errors import CheckpointError
from qwenft.training.folder import environment, new_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

FORMAT = 2
MANIFEST = "manifest.json"


def write_checkpoint(
    path: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]], values: dict[str, Any]
) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: of the new folder.
        tensors: of each file, by the file's name without ".safetensors".
        values: JSON values.

    Raises:
        CheckpointError: the place is taken or cannot be written; what was there is as it was.
    """
    with new_folder(path) as folder:
        files = {}
        for name, held in tensors.items():
            file = folder / f"{name}.safetensors"
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in held.items()}, file)
            files[file.name] = _describe(file)
        manifest = {"format": FORMAT, **values, "environment": environment(), "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> dict[str, Any]:
    """The values of a checkpoint, its files checked against it.

    Raises:
        CheckpointError: it is no checkpoint, or of another format, or a file is missing, cut or altered.
    """
    fix = f"remove {path}, and continue from the checkpoint before it"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        written_as, files = manifest["format"], dict(manifest["files"])
    except OSError as error:
        problem = f"{path} is no checkpoint: {MANIFEST} cannot be read: {error.strerror}"
        raise CheckpointError(problem, path=path) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: is damaged: {error!r}", fix=fix, path=path) from None
    if written_as != FORMAT:
        raise CheckpointError(
            f"{path}: expected a checkpoint of format {FORMAT}, got {written_as!r}",
            fix="the version of qwenft that wrote it",
            path=path,
        )
    for name, expected in files.items():
        try:
            found = _describe(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read: {error.strerror}", fix=fix, path=path) from None
        if found != expected:
            what = "bytes" if found["bytes"] != expected["bytes"] else "sha256"
            raise CheckpointError(
                f"{path / name}: is damaged: expected {what} {expected[what]}, got {found[what]}",
                fix=fix,
                path=path,
            )
    return dict(manifest)


def read_tensors(path: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one file of a checkpoint, on the CPU.

    Raises:
        CheckpointError: the file cannot be read.
    """
    file = path / f"{name}.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}", path=path) from None


def require_same(saved: Any, present: Any, *, subject: str, fix: str, path: Path) -> None:
    """Refuse to go on from something else than what is trained now.

    Args:
        saved: JSON values of what was trained.
        present: those of what is to be trained.
        subject: what is compared, for the message.
        fix: what mends it.
        path: where ``saved`` lies.

    Raises:
        CheckpointError: they differ; the message lists each difference, and `.differences` holds them.
    """
    found = differences(saved, present)
    if found:
        listed = "".join(f"\n     {line}" for line in found)
        raise CheckpointError(f"{path} is of another {subject}:{listed}", fix=fix, path=path, differences=found)


def differences(saved: Any, present: Any, place: str = "") -> list[str]:
    """The places at which two JSON values differ, with what stands there in both."""
    if isinstance(saved, dict) and isinstance(present, dict):
        found = []
        for key in [*saved, *(key for key in present if key not in saved)]:
            inner = f"{place}.{key}" if place else key
            found += differences(saved.get(key), present.get(key), inner)
        return found
    return [] if saved == present else [f"{place}: {saved!r} there, {present!r} here"]


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
