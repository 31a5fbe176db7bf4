"""A run folder: claimed whole or not at all."""

from __future__ import annotations

import json
import platform
import shutil
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from qwenft.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LIBRARIES = ("qwenft", "torch", "transformers", "peft", "bitsandbytes", "datasets", "tokenizers", "safetensors")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder beside its place; it takes its place only when all of it is written.

    Raises:
        CheckpointError: the place is taken, or cannot be written.
    """
    require_free(path)
    beside = path.with_name(f".{path.name}.writing")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        if path.exists():
            path.rmdir()
        beside.rename(path)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}", path=path) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def require_free(path: Path) -> None:
    """Refuse a place where something is already.

    Raises:
        CheckpointError: it is a file, or a folder that is not empty.
    """
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise CheckpointError(
            f"{path} exists already, and is not overwritten", fix=f'another folder, "{path}-2" say', path=path
        )


def claim_run_folder(path: Path, contents: dict[str, Any]) -> Path:
    """Make a run folder that holds these JSON values, and what it runs on.

    Raises:
        CheckpointError: the place is taken, or cannot be written.
    """
    with new_folder(path) as folder:
        for name, value in {**contents, "environment.json": environment()}.items():
            (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


@contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Take a folder that was just claimed away again where what follows fails, so that it can be claimed anew."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def environment() -> dict[str, str]:
    """Versions of the interpreter and of the libraries that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}
