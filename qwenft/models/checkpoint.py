"""Where a checkpoint lies, and what its config.json says; no weight is read here."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenft.errors import CheckpointError, nearest
from qwenft.family.architectures import FAMILY, Architecture, find

if TYPE_CHECKING:
    from qwenft.specs.model import ModelSpec

#: The file that says which tensor is in which file.
INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
_SAMPLES = 64
_SAMPLE_BYTES = 2**16
_FIX = "a checkpoint folder, a hub id such as Qwen/Qwen3.5-4B, or a family name such as qwen3.5-4b"


def architecture_of(model: ModelSpec) -> Architecture:
    """The architecture of a checkpoint, from its config.json or, for the hub's eight sizes, from the package.

    Raises:
        CheckpointError: there is no such folder or id, it holds no checkpoint, or one of another family.
    """
    if Path(model.source).is_dir():
        folder = Path(model.source)
        _require_weights(folder)
        return Architecture.from_config(_read_config(folder / "config.json"), name=str(folder))
    packaged = find(model.source)
    if packaged is not None:
        return packaged
    _require_hub_id(model.source)
    return Architecture.from_config(
        _read_config(_downloaded_config(model)), name=model.source, hub_id=model.source
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
    found = _read_config(path).get("quantization_config")
    return found if isinstance(found, dict) else None


def has_weights(model: ModelSpec) -> bool:
    """Whether the source names weights, and not an architecture alone."""
    return Path(model.source).is_dir() or model.source.lower() not in FAMILY


def checkpoint_folder(model: ModelSpec) -> Path:
    """The local folder of a checkpoint, downloaded through huggingface_hub where it is a hub id.

    Raises:
        CheckpointError: it cannot be had.
    """
    if Path(model.source).is_dir():
        return Path(model.source)
    _require_hub_id(model.source)
    return _download(
        model,
        lambda hub: hub.snapshot_download(model.source, revision=model.revision, allow_patterns=list(_FILES)),
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        CheckpointError: an index names a file that is missing.
    """
    index = folder / INDEX
    if not index.exists():
        return [folder / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: cannot be read: {error!r}", fix="copy it again", path=index) from None
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {index.name} names {missing[0]}, which is missing", fix="copy it again", path=folder
        )
    return [folder / name for name in names]


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


def _require_weights(folder: Path) -> None:
    for names in (("config.json",), ("model.safetensors", INDEX)):
        if not any((folder / name).exists() for name in names):
            raise CheckpointError(
                f"{folder} is no checkpoint: it holds no {' or '.join(names)}", fix=_FIX, path=folder
            )


def _require_hub_id(source: str) -> None:
    if Path(source).exists() or Path(source).is_absolute() or not _HUB_ID.fullmatch(source):
        hint = nearest(source.lower(), FAMILY)
        raise CheckpointError(f"{source!r} is neither a folder nor a hub id{hint}", fix=_FIX, path=source)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}", fix=_FIX, path=path) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object", fix=_FIX, path=path)
    return config


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
