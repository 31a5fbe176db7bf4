"""Tokenised data on disk, under a key of all that they are made of and of nothing else.

An entry is a folder that is filled beside its place and takes it at once, so that neither a build that is killed
nor two at once leave what is not whole. It lies in ``$QWENFT_CACHE``, else in ``qwenft`` in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from qwenft.data.document import Document
from qwenft.data.media import Medium
from qwenft.data.pictures import Picture
from qwenft.data.sources import files_of, resolved, signature
from qwenft.errors import DataError
from qwenft.specs.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenft.data.chat import ChatEncoder
    from qwenft.specs.data import DataSpec

# What of a DataSpec decides of the documents; lengths and packing come after them.
_OPTIONS = (
    "format",
    "names",
    "trained_roles",
    "turns",
    "end_of_turn",
    "tool_calls",
    "thinking",
    "template",
    "control_tokens",
    "bad_rows",
)
_MODULES = ("formats", "sources", "template", "masking", "document", "chat", "media", "pictures", "cache")
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")
_ARRAYS = {
    "input_ids": np.int32,
    "labels": np.int32,
    "weights": np.float32,
    "ends": np.int32,
    "lengths": np.int64,
    "end_counts": np.int64,
    "weighted": np.bool_,
    "files": np.int32,
    "rows": np.int64,
}
_ABANDONED = 24 * 3600  # seconds after which a build that was killed is cleared away


@attrs.frozen(eq=False)
class Tokenised:
    """The documents of a source.

    Args:
        documents: in its order, of any length.
        skipped: the errors of rows that are wrong, where the data skip these.
        cache: where they were read from or written to, or why they are in memory alone.
    """

    documents: list[Document]
    skipped: list[DataError]
    cache: str


def tokenised(data: DataSpec, encoder: ChatEncoder) -> Tokenised:
    """The documents of a source from the cache, or encoded and written there.

    Raises:
        DataError: a row is wrong and the data do not skip it, or a file changes meanwhile.
    """
    data = resolved(data)
    files = files_of(data)
    names = list(map(str, files)) or [str(data.source)]
    before = [signature(path) for path in files]
    place = folder() / _key(data, files, encoder)
    if (found := _read(place, names)) is not None:
        return attrs.evolve(found, cache=f"read from {place}")
    skipped: list[DataError] = []
    documents = list(encoder.encode(data, skipped if data.bad_rows == "skip" else None))
    skipped.sort(key=lambda error: (names.index(error.file) if error.file in names else 0, error.row))
    for path, then in zip(files, before, strict=True):
        if signature(path) != then:
            raise DataError(f"{path}: changed while it was read", fix="start again when it is written", row=None)
    built = Tokenised(documents, skipped, "")
    if any(isinstance(picture.source, bytes) for one in documents for m in one.media for picture in m.pictures):
        return attrs.evolve(built, cache="in memory alone: images that came as bytes cannot be kept")
    try:
        _write(built, place, names)
    except OSError as error:
        return attrs.evolve(built, cache=f"in memory alone: {place.parent} cannot be written: {error.strerror}")
    return attrs.evolve(_read(place, names) or built, cache=f"written to {place}")


def folder() -> Path:
    """Where entries lie."""
    if named := os.environ.get("QWENFT_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwenft"


def _key(data: DataSpec, files: Sequence[Path], encoder: ChatEncoder) -> str:
    tokenizer = encoder.tokenizer
    parts: dict[str, Any] = {name: getattr(data, name) for name in _OPTIONS}
    parts["source"] = (
        data.source.digest
        if isinstance(data.source, Rows)
        else [(path.suffix.lower(), _digest(path)) for path in files]
    )
    parts["tokenizer"] = [
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    ]
    if encoder.media is not None:
        images = attrs.asdict(data.images)
        del images["workers"]
        # How long a document may be decides of its images where they are made to fit.
        parts["media"] = [encoder.media.identity, images, data.max_length if data.overflow == "resize" else None]
    home = resources.files("qwenft.data")
    parts["code"] = [(home / f"{name}.py").read_text(encoding="utf-8") for name in _MODULES]
    parts["libraries"] = {name: version(name) for name in _LIBRARIES}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(built: Tokenised, place: Path, names: Sequence[str]) -> None:
    """Fill a folder beside its place and move it there, unless another build was first."""
    place.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in place.parent.glob(".building-*"):
        if time.time() - abandoned.stat().st_mtime > _ABANDONED:
            shutil.rmtree(abandoned, ignore_errors=True)
    beside = Path(tempfile.mkdtemp(prefix=".building-", dir=place.parent))
    try:
        counts = _write_arrays(built.documents, beside, names)
        lost = {number: one.lost for number, one in enumerate(built.documents) if one.lost}
        errors = [_named(error, names) for error in built.skipped]
        media = {number: [_plain(m) for m in one.media] for number, one in enumerate(built.documents) if one.media}
        index = json.dumps({"counts": counts, "lost": lost, "skipped": errors, "media": media})
        (beside / "index.json").write_text(index, encoding="utf-8")
        if _read(place, names) is None:  # another build was not first
            shutil.rmtree(place, ignore_errors=True)
            beside.rename(place)
    except OSError:
        if _read(place, names) is None:
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_arrays(documents: Sequence[Document], beside: Path, names: Sequence[str]) -> dict[str, int]:
    columns: dict[str, list[Any]] = {
        "input_ids": [one.input_ids for one in documents],
        "labels": [one.labels for one in documents],
        "weights": [one.weights for one in documents if one.weights is not None],
        "ends": [one.ends for one in documents],
        "lengths": [len(one) for one in documents],
        "end_counts": [len(one.ends) for one in documents],
        "weighted": [one.weights is not None for one in documents],
        "files": [names.index(one.file) for one in documents],
        "rows": [one.row for one in documents],
    }
    counts = {}
    for name, dtype in _ARRAYS.items():
        counts[name] = 0
        with (beside / name).open("wb") as file:
            for piece in columns[name] if columns[name] and np.ndim(columns[name][0]) else [columns[name]]:
                array: np.ndarray = np.asarray(piece, dtype=dtype)
                file.write(array.tobytes())
                counts[name] += len(array)
    return counts


def _named(error: DataError, names: Sequence[str]) -> dict[str, Any]:
    """An error without the names of sources, which may be others when it is read again."""
    number = names.index(error.file) if error.file in names else None
    problem = str(error)
    return {
        "problem": problem if number is None else problem.replace(names[number], "\0"),
        "file": number,
        "row": error.row,
    }


def _read(place: Path, names: Sequence[str]) -> Tokenised | None:
    """An entry, or None where there is none or it is damaged; its arrays stay on disk until they are used."""
    try:
        index = json.loads((place / "index.json").read_text(encoding="utf-8"))
        arrays = {name: _mapped(place / name, index["counts"][name], dtype) for name, dtype in _ARRAYS.items()}
        media = {int(number): tuple(map(_medium, found)) for number, found in index["media"].items()}
        if not all(_is_there(picture) for of_one in media.values() for m in of_one for picture in m.pictures):
            return None
    except (OSError, ValueError, KeyError):
        return None
    lengths = arrays["lengths"]
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    end_starts = np.concatenate([[0], np.cumsum(arrays["end_counts"])]).tolist()
    weighted = arrays["weighted"]
    weight_starts = np.concatenate([[0], np.cumsum(lengths * weighted)]).tolist()
    documents = []
    for number, (file, row) in enumerate(zip(arrays["files"].tolist(), arrays["rows"].tolist(), strict=True)):
        tokens = slice(starts[number], starts[number + 1])
        weights = arrays["weights"][weight_starts[number] : weight_starts[number + 1]]
        documents.append(
            Document(
                input_ids=arrays["input_ids"][tokens],
                labels=arrays["labels"][tokens],
                file=names[file],
                row=row,
                weights=weights if weighted[number] else None,
                ends=arrays["ends"][end_starts[number] : end_starts[number + 1]],
                lost=tuple(index["lost"].get(str(number), ())),
                media=media.get(number, ()),
            )
        )
    skipped = []
    for error in index["skipped"]:
        name = None if error["file"] is None else names[error["file"]]
        problem = error["problem"].replace("\0", name or "\0")
        skipped.append(DataError(problem, file=name, row=error["row"]))
    return Tokenised(documents, skipped, "")


def _plain(medium: Medium) -> dict[str, Any]:
    """A medium as JSON holds it."""
    values = attrs.asdict(medium)
    for picture in values["pictures"]:
        picture["source"] = str(picture["source"])
    return values


def _medium(values: dict[str, Any]) -> Medium:
    pictures = tuple(
        Picture(
            Path(one["source"]),
            one["height"],
            one["width"],
            None if one["signature"] is None else tuple(one["signature"]),
        )
        for one in values["pictures"]
    )
    tuples = {name: tuple(values[name]) for name in ("grid", "starts", "bounds")}
    return Medium(**{**values, **tuples, "pictures": pictures})


def _is_there(picture: Picture) -> bool:
    """Whether the file of a picture is the one that was measured."""
    assert isinstance(picture.source, Path)
    found = picture.source.stat()
    return picture.signature in (None, (found.st_size, found.st_mtime_ns))


def _mapped(path: Path, count: int, dtype: Any) -> np.ndarray:
    if path.stat().st_size != count * np.dtype(dtype).itemsize:
        msg = f"{path} is not whole"
        raise ValueError(msg)
    mapped = np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype=dtype)
    return mapped.view(np.ndarray)  # a memmap's own slices cost more than what they hold
