"""The one checkpoint format: a folder of safetensors with a JSON manifest, and no pickle.

``manifest.json`` holds plain values, and the size and sha256 of every other file; ``NAME.safetensors`` holds
tensors, and of several processes each writes a ``NAME-00001-of-00004.safetensors`` with the parts that it has, in
the form of torch.distributed.checkpoint, whose planner gives any other number of processes its parts. A folder
takes its place when all of it is on the disk, so that what has a checkpoint's name is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from functools import lru_cache
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from qwenft.errors import CheckpointError, DamagedError
from qwenft.models.export import Update
from qwenft.models.weights import canonical
from qwenft.training.contents import require_contents, require_plain, require_states, require_whole
from qwenft.training.differences import differences
from qwenft.training.environment import versions
from qwenft.training.folder import (
    abandon_folder,
    begin_folder,
    beside,
    cannot_be_written,
    flush,
    place_folder,
)
from qwenft.training.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

FORMAT = 3
#: What safetensors and torch's reader raise where a file cannot be read; the last of them is no Exception.
_READ_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError, CheckpointException)
MANIFEST = "manifest.json"


class Writing:
    """A checkpoint that is being written by all processes, each its own files, while they go on.

    Args:
        path: of the new folder.
        tensors: of each file, by the file's name without ".safetensors"; they are copied first.
        values: JSON values.
        ranks: the processes.
        starts: of tensors that are shared out, by their names, the first of their rows that this process has.

    Raises:
        CheckpointError: the place is taken or cannot be written; what was there is as it was.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        values: dict[str, Any],
        ranks: Ranks = ALONE,
        starts: Mapping[str, int] | None = None,
    ) -> None:
        self.path, self._values, self._ranks, self._starts = path, values, ranks, starts or {}
        own = sum(tensor.nbytes for held in tensors.values() for tensor in held.values())
        (needed,) = ranks.sum([own])
        ranks.by_first(lambda: self._begin(int(needed)))
        self._tensors = {
            name: {
                key: tensor.detach().to("cpu", copy=ranks.count > 1).contiguous() for key, tensor in held.items()
            }
            for name, held in tensors.items()
        }
        self._files: dict[str, Any] = {}
        self._error: Exception | None = None
        self._thread = Thread(target=self._write, name="checkpoint")
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether this process has written its files."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for all of them, and let the checkpoint take its place.

        Raises:
            CheckpointError: something cannot be written; nothing is left of it then.
        """
        self._thread.join()
        try:
            self._ranks.together(self._require_written)
            files = {name: found for own in self._ranks.gather(self._files) for name, found in own.items()}
            self._ranks.by_first(lambda: self._place(files))
        finally:
            if self._ranks.is_first:
                abandon_folder(self.path)

    def _begin(self, needed: int) -> None:
        begin_folder(self.path)
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            abandon_folder(self.path)
            problem = f"{self.path}: cannot be written: it takes {needed:,} bytes, and the disk has {free:,} left"
            raise CheckpointError(problem, path=self.path)

    def _write(self) -> None:
        rank, count = self._ranks.rank + 1, self._ranks.count
        suffix = "" if count == 1 else f"-{rank:05}-of-{count:05}"
        try:
            for name, held in self._tensors.items():
                file = beside(self.path) / f"{name}{suffix}.safetensors"
                if held:
                    save_file(held, file, metadata=self._places(held))
                    flush(file)
                    self._files[file.name] = _describe(file)
        except (OSError, SafetensorError) as error:
            self._error = error
        self._tensors = {}

    def _places(self, held: Mapping[str, torch.Tensor]) -> dict[str, str] | None:
        """What torch's reader takes to tell where in a tensor the parts of it are."""
        if self._ranks.count == 1:
            return None
        places = {
            key: {SAVED_OFFSETS_KEY: [self._starts.get(key, 0), *[0] * (tensor.ndim - 1)][: tensor.ndim]}
            for key, tensor in held.items()
        }
        return {CUSTOM_METADATA_KEY: json.dumps(places)}

    def _require_written(self) -> None:
        if self._error is not None:
            raise cannot_be_written(self.path, self._error)

    def _place(self, files: dict[str, Any]) -> None:
        manifest = {"format": FORMAT, **self._values, "environment": versions(), "files": files}
        try:
            (beside(self.path) / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            place_folder(self.path)
        except OSError as error:
            raise cannot_be_written(self.path, error) from error


def read_manifest(path: Path) -> dict[str, Any]:
    """The values of a checkpoint, its files checked against it.

    Raises:
        DamagedError: it has no manifest, or a file is missing, cut or altered.
        CheckpointError: it is of another format, or cannot be read at the moment.
    """
    fix = f"remove {path}, and continue from the checkpoint before it"
    require_plain(path, MANIFEST)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        written_as, files = manifest["format"], dict(manifest["files"])
    except OSError as error:
        problem = f"{path} is no checkpoint: {MANIFEST} cannot be read: {error.strerror}"
        raise _unreadable(error)(problem, path=path) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path / MANIFEST}: is damaged: {error!r}", fix=fix, path=path) from None
    if written_as != FORMAT:
        raise CheckpointError(
            f"{path}: expected a checkpoint of format {FORMAT}, got {written_as!r}",
            fix="the version of qwenft that wrote it",
            path=path,
        )
    require_contents(path, manifest)
    for name, expected in files.items():
        try:
            found = _describe(path / name)
        except OSError as error:
            problem = f"{path / name}: cannot be read: {error.strerror}"
            raise _unreadable(error)(problem, fix=fix, path=path) from None
        if found != expected:
            what = "bytes" if found["bytes"] != expected["bytes"] else "sha256"
            raise DamagedError(
                f"{path / name}: is damaged: expected {what} {expected[what]}, got {found[what]}",
                fix=fix,
                path=path,
            )
    return dict(manifest)


def _unreadable(error: OSError) -> type[CheckpointError]:
    """What is gone is damaged; what cannot be read may be whole."""
    return DamagedError if isinstance(error, FileNotFoundError) else CheckpointError


def stored_tensors(path: Path) -> dict[str, dict[str, tuple[torch.Size, torch.dtype]]]:
    """The shape and dtype of every tensor of a checkpoint, of shared ones as a whole, by the file that has it.

    Raises:
        CheckpointError: a file cannot be read.
    """
    try:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata()
    except _READ_ERRORS as error:
        raise _not_read(path, error) from error
    require_whole(path, metadata)
    found: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}, "random": {}}
    for place, stored in metadata.storage_data.items():
        tensor = metadata.state_dict_metadata[place.fqn]
        assert isinstance(tensor, TensorStorageMetadata)
        part = stored.relative_path.rpartition("/")[2].removesuffix(".safetensors").partition("-")[0]
        found[part][place.fqn] = (tensor.size, tensor.properties.dtype)
    require_states(path, found)
    return found


def read_tensors(path: Path, wanted: dict[str, torch.Tensor]) -> None:
    """Fill tensors by their names in a checkpoint; of a DTensor this process's part, however it was saved.

    Raises:
        CheckpointError: a file cannot be read.
    """
    try:
        with warnings.catch_warnings():
            # Every process plans and reads for itself.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(wanted, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    except _READ_ERRORS as error:
        raise _not_read(path, error) from error


def _not_read(path: Path, error: BaseException) -> CheckpointError:
    """What torch wraps is in its last line."""
    cause = str(error).strip().splitlines()[-1]
    fix = f"remove {path}, and continue from the checkpoint before it"
    return CheckpointError(f"{path}: cannot be read: {cause}", fix=fix, path=path)


def trained_in(path: Path) -> dict[str, Update]:
    """What makes each trained weight of a checkpoint; one of them is in memory at a time."""

    @lru_cache(maxsize=1)
    def read(name: str) -> torch.Tensor:
        shape, dtype = stored[name]
        wanted = {name: torch.empty(shape, dtype=dtype)}
        read_tensors(path, wanted)
        return wanted[name]

    def update(name: str) -> Update:
        return Update(lambda _, part: part.of(read(name)))

    stored = stored_tensors(path)["model"]
    return {canonical(name): update(name) for name in stored}


def require_same(
    saved: Any, present: Any, *, subject: str, fix: str, path: Path, accept: Sequence[str] = ()
) -> None:
    """Refuse to go on from something else than what is trained now.

    Args:
        saved: JSON values of what was trained.
        present: those of what is to be trained.
        subject: what is compared, for the message.
        fix: what mends it.
        path: where ``saved`` lies.
        accept: places that may differ, with all that is in them: "recipe.training", say.

    Raises:
        CheckpointError: they differ; the message lists each difference, and `.differences` holds them.
    """
    found = [line for line in differences(saved, present) if not _is_in(line.partition(": ")[0], accept)]
    if found:
        listed = "".join(f"\n     {line}" for line in found)
        raise CheckpointError(f"{path} is of another {subject}:{listed}", fix=fix, path=path, differences=found)


def _is_in(place: str, places: Sequence[str]) -> bool:
    return any(f"{place}.".startswith(f"{other}.") for other in places)


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
