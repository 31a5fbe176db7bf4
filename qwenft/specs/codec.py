"""Specs as JSON, through cattrs."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any, TypeVar

import cattrs
from cattrs.errors import BaseValidationError
from cattrs.gen import make_dict_structure_fn
from cattrs.strategies import configure_union_passthrough

from qwenft.capabilities import AttentionBackend, Backend, LinearAttentionBackend
from qwenft.errors import QwenftError, SpecError
from qwenft.specs.data import DataSpec
from qwenft.specs.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

T = TypeVar("T")


class Codec:
    """Turns specs into JSON values and back.

    Args:
        folder: where rows that are in memory are written, and read from again; None writes nothing.
        allow_modules: modules outside the package whose backends may be loaded: loading runs their code.
    """

    def __init__(self, folder: Path | None, allow_modules: Sequence[str] = ()) -> None:
        self.folder = folder
        self.allow_modules = ("qwenft", *allow_modules)
        self.converter = cattrs.Converter(forbid_extra_keys=True, prefer_attrib_converters=False)
        configure_union_passthrough(str | int | float | bool | None, self.converter)
        self.converter.register_unstructure_hook(Backend, self._dump_backend)
        self.converter.register_unstructure_hook(Rows, self._dump_rows)
        self.converter.register_structure_hook(str | AttentionBackend, self._load_backend)
        self.converter.register_structure_hook(str | LinearAttentionBackend, self._load_backend)
        self.converter.register_structure_hook(tuple[str, ...] | Rows, self._load_source)
        self.converter.register_structure_hook(float | DataSpec | None, self._load_holdout)
        self._load_data = make_dict_structure_fn(DataSpec, self.converter, _cattrs_forbid_extra_keys=True)

    def dump(self, value: Any) -> Any:
        """The JSON value of a spec; rows in memory are written beside it."""
        return self.converter.unstructure(value)

    def load(self, value: Any, cls: type[T]) -> T:
        """The spec of a JSON value.

        Raises:
            SpecError: a field is unknown, missing or ill-typed; the message names its path.
        """
        try:
            return self.converter.structure(value, cls)
        except QwenftError:
            raise
        except (BaseValidationError, ExceptionGroup) as error:
            causes = [leaf for leaf in _leaves(error) if isinstance(leaf, QwenftError)]
            if causes:
                raise causes[0] from None
            raise SpecError(f"{cls.__name__}: {'; '.join(cattrs.transform_error(error))}") from None

    def _dump_backend(self, backend: Backend) -> dict[str, Any]:
        cls = type(backend)
        if cls.__module__ == "__main__":
            raise SpecError(
                f"{cls.__name__} is defined in __main__ and cannot be found again by a saved recipe",
                fix="write its cell with %%writefile my_backend.py, then: from my_backend import " + cls.__name__,
                got=backend,
            )
        return {"class": f"{cls.__module__}:{cls.__qualname__}", "fields": backend.fields()}

    def _load_backend(self, value: Any, _: Any) -> Any:
        if isinstance(value, str):
            return value
        module, _, name = value["class"].partition(":")
        if not any(module == allowed or module.startswith(f"{allowed}.") for allowed in self.allow_modules):
            raise SpecError(
                f"the recipe names a backend of the module {module!r}, and loading it would run that module",
                fix=f'Recipe.load(path, allow_modules=["{module}"])',
                got=module,
            )
        return getattr(importlib.import_module(module), name)(**value["fields"])

    def _dump_rows(self, rows: Rows) -> dict[str, str]:
        name = f"data-{rows.digest[:16]}.jsonl"
        if self.folder is not None and not (self.folder / name).exists():
            write_atomically(self.folder / name, "".join(f"{line}\n" for line in rows.lines()))
        return {"rows": name}

    def _load_source(self, value: Any, _: Any) -> Any:
        if isinstance(value, dict):
            assert self.folder is not None
            lines = (self.folder / value["rows"]).read_text(encoding="utf-8").splitlines()
            return Rows([json.loads(line) for line in lines])
        return tuple(value)

    def _load_holdout(self, value: Any, _: Any) -> Any:
        return self._load_data(value, DataSpec) if isinstance(value, dict) else value


def write_atomically(path: Path, content: str) -> None:
    """Write a text file beside its place and rename it, so that no half of it is ever seen."""
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(content, encoding="utf-8")
    beside.replace(path)


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
