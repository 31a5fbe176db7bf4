"""Where a checkpoint lies, and what its config.json says; no weight is read here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenft.errors import CheckpointError, nearest
from qwenft.family.architectures import FAMILY, Architecture, find

if TYPE_CHECKING:
    from qwenft.specs.model import ModelSpec

#: The file that says which tensor is in which file.
INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: A name of a file of weights that an index may give: one beside it.
_WEIGHT_FILE = re.compile(r"[^/\\\0]{1,200}\.safetensors")
#: No JSON file of a checkpoint has more; a larger one is refused before it fills the memory.
_JSON_BYTES = 2**28
_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
_SAMPLES = 64
_SAMPLE_BYTES = 2**16
_AGAIN = "copy the checkpoint again from where it was published"
_FIX = "a checkpoint folder, a hub id such as Qwen/Qwen3.5-4B, or a family name such as qwen3.5-4b"


def architecture_of(model: ModelSpec) -> Architecture:
    """The architecture of a checkpoint, from its config.json or, for the hub's eight sizes, from the package.

    Raises:
        CheckpointError: there is no such folder or id, it holds no checkpoint, one of another family, or links to
            files that lie elsewhere.
    """
    if Path(model.source).is_dir():
        folder = Path(model.source)
        require_own_files(folder)
        _require_weights(folder)
        return Architecture.from_config(read_object(folder / "config.json", _FIX), name=str(folder))
    packaged = find(model.source)
    if packaged is not None:
        return packaged
    _require_hub_id(model.source)
    return Architecture.from_config(
        read_object(_downloaded_config(model), _FIX), name=model.source, hub_id=model.source
    )


def quantization_of(model: ModelSpec) -> dict[str, Any] | None:
    """What a checkpoint's config.json says of how its weights are quantized already; None where they are not.

    Raises:
        CheckpointError: it cannot be read.
    """
    if Path(model.source).is_dir():
        path = Path(model.source) / "config.json"
    elif find(model.source) is None:
        path = _downloaded_config(model)
    else:
        return None
    found = read_object(path, _FIX).get("quantization_config")
    return found if isinstance(found, dict) else None


def has_weights(model: ModelSpec) -> bool:
    """Whether the source names weights, and not an architecture alone."""
    return Path(model.source).is_dir() or model.source.lower() not in FAMILY


def checkpoint_folder(model: ModelSpec) -> Path:
    """The local folder of a checkpoint, downloaded through huggingface_hub where it is a hub id.

    Raises:
        CheckpointError: it cannot be had, or links to files that lie elsewhere.
    """
    if Path(model.source).is_dir():
        require_own_files(Path(model.source))
        return Path(model.source)
    _require_hub_id(model.source)
    return _download(
        model,
        lambda hub: hub.snapshot_download(model.source, revision=model.revision, allow_patterns=list(_FILES)),
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        CheckpointError: an index is damaged, or names a file that is missing, elsewhere or no safetensors file.
    """
    index = folder / INDEX
    if not index.exists():
        return [folder / "model.safetensors"]
    places = read_object(index, _AGAIN).get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(f"{index}: holds no weight_map of tensors and files", fix=_AGAIN, path=index)
    for name in places.values():
        if not isinstance(name, str) or not _WEIGHT_FILE.fullmatch(name):
            problem = f"{index}: names {name!r:.100} as a file of weights; expected a .safetensors file beside it"
            raise CheckpointError(problem, fix=_AGAIN, path=index)
    names = sorted(set(places.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {index.name} names {missing[0]}, which is missing", fix="copy it again", path=folder
        )
    return [folder / name for name in names]


def require_own_files(folder: Path) -> None:
    """Refuse a folder with links to files elsewhere: these would be read, exported and published as its own.

    The hub's cache, whose snapshots link each file to the repository's blobs, is as it should be.

    Raises:
        CheckpointError: there is such a link.
    """
    home = Path(os.path.realpath(folder))
    places = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    for path in folder.iterdir():
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(place) for place in places):
            raise CheckpointError(
                f"{path} is a link to {real}, outside of the folder",
                fix=f"files of its own, if you trust them: cp -rL {folder} {folder}-copy",
                path=path,
            )


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}", fix=fix, path=path) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}", fix=fix, path=path)
    return value


def weight_digests(folder: Path) -> dict[str, str]:
    """By weight file: its size and a sha256 of samples of it, enough to tell other weights from these, quickly.

    Raises:
        CheckpointError: a file is missing.
    """
    return {file.name: file_digest(file) for file in weight_files(folder)}


def file_digest(file: Path) -> str:
    """The size of a file and a sha256 of samples of it."""
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as content:
        for sample in range(_SAMPLES):
            content.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(content.read(_SAMPLE_BYTES))
    return f"{size:,} bytes, sha256 of samples {digest.hexdigest()}"


def _text(path: Path) -> str:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a FIFO would wait for its writer
        msg = "it is no regular file"
        raise ValueError(msg)
    if found.st_size > _JSON_BYTES:
        msg = f"it has {found.st_size:,} bytes, and more than {_JSON_BYTES:,} are not read"
        raise ValueError(msg)
    return path.read_text(encoding="utf-8")


def _require_weights(folder: Path) -> None:
    for names in (("config.json",), ("model.safetensors", INDEX)):
        if not any((folder / name).is_file() for name in names):
            raise CheckpointError(
                f"{folder} is no checkpoint: it holds no {' or '.join(names)}", fix=_FIX, path=folder
            )


def _require_hub_id(source: str) -> None:
    if Path(source).exists() or Path(source).is_absolute() or not _HUB_ID.fullmatch(source):
        hint = nearest(source.lower(), FAMILY)
        raise CheckpointError(f"{source!r} is neither a folder nor a hub id{hint}", fix=_FIX, path=source)


def _downloaded_config(model: ModelSpec) -> Path:
    return _download(model, lambda hub: hub.hf_hub_download(model.source, "config.json", revision=model.revision))


def _download(model: ModelSpec, call: Any) -> Path:
    import huggingface_hub

    try:
        return Path(call(huggingface_hub))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise CheckpointError(
            f"{model.source!r} is no folder here, and the hub does not give it: {error}",
            fix="check the id, HF_TOKEN for gated models and the network, or name a checkpoint folder",
            path=model.source,
        ) from error
