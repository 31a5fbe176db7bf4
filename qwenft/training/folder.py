"""A run folder: claimed whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import shutil
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import attrs
from safetensors import SafetensorError

from qwenft.errors import CheckpointError
from qwenft.specs.codec import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_LIBRARIES = ("qwenft", "torch", "transformers", "peft", "bitsandbytes", "datasets", "tokenizers", "safetensors")


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


@attrs.frozen
class RunFolder:
    """The files of a run: ``plan.json``, ``environment.json``, ``metrics.jsonl``, ``checkpoints/step-N``, results.

    Args:
        path: of the folder.
    """

    path: Path

    @classmethod
    def claim(cls, path: Path, contents: dict[str, Any]) -> RunFolder:
        """Make the folder of a new run, which holds these JSON values and what it runs on.

        Raises:
            CheckpointError: the place is taken, or cannot be written.
        """
        with new_folder(path) as folder:
            for name, value in {**contents, "environment.json": environment()}.items():
                (folder / name).write_text(
                    json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
                )
        return cls(path)

    @property
    def is_claimed(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / "plan.json").is_file()

    @property
    def identity(self) -> dict[str, Any]:
        """What the run was begun with: all that its result depends on.

        Raises:
            CheckpointError: the file that says so is damaged, or is no plan of a run.
        """
        path = self.path / "plan.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))["identity"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no plan of a run: {error!r}", path=path) from None

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Steps and folders of the checkpoints, the earliest first."""
        found = self.path.glob("checkpoints/step-*")
        return dict(sorted((int(path.name.removeprefix("step-")), path) for path in found))

    def checkpoint(self, step: int) -> Path:
        """The folder of a step's checkpoint, there or not."""
        return self.path / "checkpoints" / f"step-{step}"

    def drop_checkpoints(self, *, keep: int, best: int | None) -> None:
        """Remove all but the newest ``keep`` checkpoints and that of the step ``best``."""
        checkpoints = self.checkpoints
        for step in [step for step in list(checkpoints)[:-keep] if step != best]:
            leaving = checkpoints[step].with_name(f".step-{step}.leaving")
            checkpoints[step].rename(leaving)  # what is half removed must not look like a checkpoint
            shutil.rmtree(leaving)

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def history(self) -> list[dict[str, Any]]:
        """The records of the metrics."""
        return _whole_lines(self.metrics) if self.metrics.exists() else []

    def append(self, name: str, values: dict[str, Any]) -> None:
        """Add a line to a file of JSON lines."""
        with (self.path / name).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(values, ensure_ascii=False) + "\n")

    def list_skipped(self, errors: Iterable[str]) -> None:
        """Add the errors of rows that are left out to ``skipped.jsonl``, each once."""
        new = dict.fromkeys(errors)
        if new and (path := self.path / "skipped.jsonl").exists():
            for line in _whole_lines(path):
                new.pop(line["error"], None)
        for error in new:
            self.append("skipped.jsonl", {"error": error})

    def flush(self) -> None:
        """Wait until the metrics are on the disk: a checkpoint must not outlive its history."""
        if self.metrics.exists():
            flush(self.metrics)

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Cut the files of JSON lines behind ``step``, and return the metrics up to there.

        A run that was stopped between two checkpoints wrote lines of steps that it is going to repeat; what it
        left half written is removed.
        """
        for unfinished in self.path.glob("checkpoints/.*"):
            shutil.rmtree(unfinished)
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (self.path / name).exists():
                kept = [record for record in _whole_lines(self.path / name) if record["step"] <= step]
                write_atomically(self.path / name, "".join(f"{json.dumps(r, ensure_ascii=False)}\n" for r in kept))
        self.flush()
        return self.history


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file; a last line that was cut by a crash is none."""
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


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
