"""Specs as JSON, through cattrs."""

from __future__ import annotations

import importlib
import json
import operator
import os
import re
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar, get_origin

import attrs
import cattrs
from cattrs.errors import BaseValidationError
from cattrs.gen import make_dict_structure_fn

from qwenft.capabilities import AttentionBackend, Backend, LinearAttentionBackend
from qwenft.errors import CheckpointError, QwenftError, SpecError
from qwenft.specs.base import refuse_renamed
from qwenft.specs.data import DataSpec
from qwenft.specs.rows import HubRows, IteratedRows, Rows, Source

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

T = TypeVar("T")
_ROWS_NAME = re.compile(r"data-[0-9a-f]{16}\.jsonl")
_Mixed = tuple[tuple[DataSpec, float], ...]


class Codec:
    """Turns specs into JSON values and back.

    Args:
        folder: where rows that are in memory are written, and read from again; None describes a value without
            saving it: no rows are written, and what could not be loaded again is not refused.
        allow_modules: modules outside the package whose backends and losses may be loaded: that runs their code.
    """

    def __init__(self, folder: Path | None, allow_modules: Sequence[str] = ()) -> None:
        self.folder = folder
        self.allow_modules = ("qwenft", *allow_modules)
        self.converter = cattrs.Converter(forbid_extra_keys=True, prefer_attrib_converters=False)
        # Values are handed on as they are, for the specs to check: cattrs alone would turn "no" into True.
        for primitive in (str, int, float, bool):
            self.converter.register_structure_hook(primitive, lambda value, _: value)
        self.converter.register_structure_hook_func(_is_tuple_type, _load_tuple)
        self.converter.register_structure_hook_factory(attrs.has, self._spec_loader)
        self.converter.register_unstructure_hook(Backend, self._dump_backend)
        self.converter.register_unstructure_hook(Rows, self._dump_rows)
        self.converter.register_unstructure_hook(FunctionType, self._dump_function)
        self.converter.register_structure_hook(str | AttentionBackend, self._load_backend)
        self.converter.register_structure_hook(str | LinearAttentionBackend, self._load_backend)
        self.converter.register_structure_hook(str | Callable[..., Any], self._load_loss)
        self.converter.register_unstructure_hook(IteratedRows, self._dump_iterated)
        self.converter.register_structure_hook(Source, self._load_source)
        self.converter.register_structure_hook_func(lambda kind: kind == _Mixed, self._load_mixed)
        self.converter.register_structure_hook(float | DataSpec | None, self._load_holdout)

    def dump(self, value: Any) -> Any:
        """The JSON value of a spec; rows in memory are written beside it."""
        return self.converter.unstructure(value)

    def load(self, value: Any, cls: type[T]) -> T:
        """The spec of a JSON value.

        Raises:
            SpecError: a field is unknown, missing or ill-typed; the message names its path.
            CheckpointError: the rows beside it are missing, or are not those that were saved.
        """
        try:
            return self.converter.structure(value, cls)
        except QwenftError:
            raise
        except (BaseValidationError, ExceptionGroup, RecursionError) as error:
            causes = [leaf for leaf in _leaves(error) if isinstance(leaf, QwenftError)]
            if causes:
                raise causes[0] from None
            problems = [str(error)] if isinstance(error, RecursionError) else cattrs.transform_error(error)
            raise SpecError(f"{cls.__name__}: {'; '.join(problems)}") from None

    def _dump_backend(self, backend: Backend) -> dict[str, Any]:
        problem = cannot_be_saved(backend)
        if problem is not None and self.folder is not None:
            raise problem
        fields = repr(backend) if problem is not None else backend.fields()
        return {"class": _place(type(backend)), "fields": fields}

    def _load_backend(self, value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            return value
        place, fields = value.get("class"), value.get("fields")
        if set(value) != {"class", "fields"} or not isinstance(place, str) or not isinstance(fields, dict):
            raise SpecError(
                f'a backend: expected a name or {{"class": "module:Class", "fields": {{}}}}, got {value!r}',
                got=value,
            )
        cls = self._import(place, "backend")
        if not (isinstance(cls, type) and issubclass(cls, Backend)):
            raise SpecError(f"the recipe names {place} as a backend, and it is none", got=place)
        try:
            return cls(**fields)
        except TypeError as error:
            raise SpecError(f"the recipe names the backend {place}, which cannot be made: {error}") from None

    def _dump_function(self, function: FunctionType) -> dict[str, str]:
        problem = cannot_be_saved(function)
        if problem is not None and self.folder is not None:
            raise problem
        return {"function": _place(function)}

    def _load_loss(self, value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            return value
        place = value.get("function")
        if set(value) != {"function"} or not isinstance(place, str):
            raise SpecError(f'a loss: expected a name or {{"function": "module:name"}}, got {value!r}', got=value)
        return self._import(place, "loss")

    def _import(self, place: str, what: str) -> Any:
        """What stands at ``module:name``, where that module may be run."""
        module, _, name = place.partition(":")
        if not self._allows(module):
            raise SpecError(
                f"the recipe names a {what} of the module {module!r}, and loading it would run that module",
                fix=f'Recipe.load(path, allow_modules=["{module}"]), if you trust it',
                got=module,
            )
        try:
            found = operator.attrgetter(name)(importlib.import_module(module))
        except (ImportError, AttributeError, ValueError) as error:
            raise SpecError(f"the recipe names the {what} {place}, which cannot be loaded: {error}") from None
        # A module has what it imports too: of the package's own that is json, shutil and subprocess.
        home = getattr(found, "__module__", None)
        if not self._allows(str(home)):
            raise SpecError(
                f"the recipe names the {what} {place}, which is of the module {home!r}",
                fix=f"a {what} that is defined in {module}",
                got=place,
            )
        return found

    def _allows(self, module: str) -> bool:
        return any(module == allowed or module.startswith(f"{allowed}.") for allowed in self.allow_modules)

    def _dump_iterated(self, rows: IteratedRows) -> dict[str, str]:
        if self.folder is not None:
            raise _cannot_be_written(rows)
        return {"iterated": str(rows)}

    def _dump_rows(self, rows: Rows) -> dict[str, str]:
        name = _rows_name(rows)
        if self.folder is not None and not (self.folder / name).exists():
            lines = "".join(f"{line}\n" for line in rows.lines())
            write_atomically(self.folder / name, lines, permissions=0o600)  # the user's data
        return {"rows": name}

    def _load_source(self, value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            return _tuples(value)
        if "split" in value:
            return self.converter.structure(value, HubRows)
        name = value.get("rows")
        if set(value) != {"rows"} or not isinstance(name, str) or not _ROWS_NAME.fullmatch(name):
            raise SpecError(f'DataSpec.source: expected paths or {{"rows": "data-....jsonl"}}, got {value!r}')
        assert self.folder is not None
        path = self.folder / name
        try:
            with path.open(encoding="utf-8") as lines:
                rows = Rows([json.loads(line) for line in lines])
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}", path=path) from None
        except (ValueError, RecursionError):
            rows = None
        if rows is None or name != _rows_name(rows):
            raise CheckpointError(
                f"{path} holds other rows than were saved", fix="DataSpec.messages(path) to use them", path=path
            )
        return rows

    def _load_mixed(self, value: Any, _: Any) -> Any:
        pairs = _tuples(value)
        if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            return pairs  # for the spec to refuse
        return tuple((self.converter.structure(data, DataSpec), times) for data, times in pairs)

    def _load_holdout(self, value: Any, _: Any) -> Any:
        return self.converter.structure(value, DataSpec) if isinstance(value, dict) else value

    def _spec_loader(self, cls: type[T]) -> Callable[[Any, Any], T]:
        """The hook of a spec, which names what is no object."""
        load = make_dict_structure_fn(cls, self.converter, _cattrs_forbid_extra_keys=True)
        known = [field.name for field in attrs.fields(cls)]  # type: ignore[arg-type] # all specs are attrs classes

        def structure(value: Any, _: Any) -> T:
            if not isinstance(value, dict):
                raise SpecError(f"{cls.__name__}: expected a JSON object, got {value!r}", got=value)
            refuse_renamed(cls, [name for name in value if name not in known])
            return load(value, cls)

        return structure


def cannot_be_saved(value: Backend | FunctionType | IteratedRows) -> SpecError | None:
    """Why a saved recipe could not find this backend, function or data set again, or None where it can."""
    if isinstance(value, IteratedRows):
        return _cannot_be_written(value)
    named = value if isinstance(value, FunctionType) else type(value)
    if named.__module__ == "__main__":
        return SpecError(
            f"{named.__name__} is defined in __main__ and cannot be found again by a saved recipe",
            fix="write its cell with %%writefile my_module.py, then: from my_module import " + named.__name__,
            got=value,
        )
    if "<" in named.__qualname__:  # <locals> or <lambda>
        return SpecError(
            f"{named.__name__} is defined inside a function and cannot be found again by a saved recipe",
            fix=f"define {named.__name__} at the top of {named.__module__}",
            got=value,
        )
    return None if isinstance(value, FunctionType) else _fields_problem(value)


def _cannot_be_written(rows: IteratedRows) -> SpecError:
    return SpecError(
        f"{rows} in memory cannot be found again by a saved recipe",
        fix='files, or a data set by its name: DataSpec.messages("organisation/name", split="train").stream()',
        got=rows,
    )


def _fields_problem(backend: Backend) -> SpecError | None:
    fields = backend.fields()
    try:
        plain = json.loads(json.dumps(fields)) == fields
    except (TypeError, ValueError):
        plain = False
    if plain:
        return None
    return SpecError(
        f"{backend!r} has fields that JSON cannot hold",
        fix="fields of strings, numbers, booleans and lists",
        got=backend,
    )


def write_atomically(path: Path, content: str, *, permissions: int = 0o666) -> None:
    """Write a text file beside its place and rename it: no half of it is ever seen, after a crash either."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        with open(beside, "w", encoding="utf-8", opener=partial(os.open, mode=permissions)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _place(named: Any) -> str:
    return f"{named.__module__}:{named.__qualname__}"


def _rows_name(rows: Rows) -> str:
    return f"data-{rows.digest[:16]}.jsonl"


def _is_tuple_type(kind: Any) -> bool:
    return get_origin(kind) is tuple


def _load_tuple(value: Any, _: Any) -> Any:
    return _tuples(value)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, all the way down."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
