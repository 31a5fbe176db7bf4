"""Folders that take their place whole or not at all."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from qwenft.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder beside its place; it takes its place only when all of it is written.

    Raises:
        CheckpointError: the place is taken, or cannot be written.
    """
    begin_folder(path)
    try:
        yield beside(path)
        place_folder(path)
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        raise cannot_be_written(path, error) from error
    finally:
        abandon_folder(path)


def beside(path: Path) -> Path:
    """The folder that is filled before it takes the place of ``path``."""
    return path.with_name(f".{path.name}.writing")


def begin_folder(path: Path) -> None:
    """Make the folder beside a place that is free, empty.

    Raises:
        CheckpointError: the place is taken, or cannot be written.
    """
    require_free(path)
    try:
        abandon_folder(path)
        beside(path).mkdir(parents=True)
    except OSError as error:
        raise cannot_be_written(path, error) from error


def place_folder(path: Path) -> None:
    """Let the folder beside take its place, when all of it is on the disk."""
    filled = beside(path)
    for written in sorted(filled.rglob("*")):
        flush(written)
    flush(filled)
    if path.exists():
        path.rmdir()
    filled.rename(path)
    flush(path.parent)


def abandon_folder(path: Path) -> None:
    """Remove what is left beside a place."""
    shutil.rmtree(beside(path), ignore_errors=True)


def cannot_be_written(path: Path, error: Exception) -> CheckpointError:
    """The error of a place that cannot be written; that of safetensors keeps of a full disk the words alone."""
    return CheckpointError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}", path=path)


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
