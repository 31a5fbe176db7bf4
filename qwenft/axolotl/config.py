"""A configuration as checked values, and what is found while it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from qwenft.errors import CheckpointError, SpecError, nearest
from qwenft.plan.findings import Finding, error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from qwenft.specs.base import Check

T = TypeVar("T")


@attrs.frozen
class Refused:
    """A key that is not offered.

    Args:
        reason: why.
        fix: what to do instead.
        fine: values that ask for nothing, beside those that are empty or false.
    """

    reason: str
    fix: str
    fine: tuple[Any, ...] = ()

    def is_asked_by(self, value: Any) -> bool:
        """Whether a value asks for what is refused."""
        return bool(value) and all(value != fine or type(value) is not type(fine) for fine in self.fine)


@attrs.frozen
class Keys:
    """What the keys of a mapping mean here.

    Args:
        read: keys with a meaning, and what their values are.
        no_effect: keys without one, and why.
        not_offered: keys that would change the result, and cannot be followed.
    """

    read: Mapping[str, Check]
    no_effect: Mapping[str, str] = attrs.field(factory=dict)
    not_offered: Mapping[str, Refused] = attrs.field(factory=dict)

    def __iter__(self) -> Iterator[str]:
        yield from (*self.read, *self.no_effect, *self.not_offered)


class Config:
    """The values of a mapping; keys that are empty count as absent.

    Args:
        given: the mapping, as YAML has it.
        keys: what its keys mean.
        outer: the configuration that it is part of.
        place: where it stands in that one.
    """

    def __init__(self, given: Mapping[Any, Any], keys: Keys, outer: Config | None = None, place: str = "") -> None:
        self.given = {str(key): value for key, value in given.items()}
        self.place = place
        self.problems: list[Finding] = [] if outer is None else outer.problems
        self.notes: list[str] = [] if outer is None else outer.notes
        self.values: dict[str, Any] = {}
        for key, value in self.given.items():
            self._take(key, value, keys)

    def _take(self, key: str, value: Any, keys: Keys) -> None:
        if key not in keys:
            self.problems.append(
                error(f"{self.place}{key}", f"is not known{nearest(key, keys)}", "leave it out, or its right name")
            )
        elif value is None:
            pass
        elif key in keys.read:
            self._check(key, value, keys.read[key])
        elif key in keys.no_effect:
            self.note(key, keys.no_effect[key])
        elif keys.not_offered[key].is_asked_by(value):
            self.refuse(key, keys.not_offered[key].reason, keys.not_offered[key].fix)

    def _check(self, key: str, value: Any, check: Check) -> None:
        # YAML 1.1 reads 2e-5, which has no point, as a text.
        candidates = (value, _number(value)) if isinstance(value, str) else (value,)
        accepted = [candidate for candidate in candidates if check.accepts(candidate)]
        if accepted:
            self.values[key] = accepted[0]
        else:
            place = f"{self.place}{key}"
            self.problems.append(error(place, f"expected {check.expected}, got {value!r:.80}", check.example))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default where it is absent or wrong."""
        return self.values.get(key, default)

    def has(self, key: str) -> bool:
        """Whether a key is given, rightly or wrongly."""
        return self.given.get(key) is not None

    def shown(self, key: str) -> str:
        """A key and what it is given, as the file has it."""
        value = self.given.get(key)
        text = str(value).lower() if isinstance(value, bool) else str(value)
        return f"{self.place}{key}: {text if len(text) <= 60 else f'{text[:57]}...'}"

    def note(self, key: str, reason: str) -> None:
        """Say what becomes of a key."""
        self.notes.append(f"{self.shown(key)}: {reason}")

    def refuse(self, key: str, reason: str, fix: str) -> None:
        """Collect a problem with a key's value."""
        self.problems.append(error(self.shown(key), reason, fix))

    def missing(self, key: str, fix: str) -> None:
        """Collect that a key is absent, unless it is there and wrong in itself."""
        if not self.has(key):
            self.problems.append(error(f"{self.place}{key}", "is missing", fix))

    def inside(self, key: str, keys: Keys) -> Config:
        """The mapping under a key, empty where there is none; what is found in it is found here."""
        return Config(self.get(key, {}), keys, self, f"{self.place}{key}.")

    def items(self, key: str, keys: Keys) -> list[Config]:
        """The mappings of the list under a key."""
        return [
            Config(item, keys, self, f"{self.place}{key}[{number}].")
            for number, item in enumerate(self.get(key, ()))
        ]

    def attempt(self, key: str, read: Callable[[], T]) -> T | None:
        """What ``read`` returns; None, and a problem of this key, where a spec refuses a value."""
        try:
            return read()
        except (SpecError, CheckpointError) as refused:
            self.problems.append(error(f"{self.place}{key}", refused.problem, refused.fix))
            return None

    def raise_problems(self, path: Path) -> None:
        """Raise all that was found, if anything was.

        Raises:
            SpecError: with every problem, its place and its remedy.
        """
        if self.problems:
            count = f"{path}: {len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
            lines = [f"  {number}. {problem}" for number, problem in enumerate(self.problems, start=1)]
            raise SpecError("\n".join([count, *lines]), path=path, problems=tuple(self.problems))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file, of plain values alone.

    Raises:
        SpecError: it cannot be read, is no YAML or no mapping, names an object of a language, or has a key twice.
    """
    import yaml

    fix = "a configuration of axolotl, such as base_model: Qwen/Qwen3.5-27B"
    try:
        text = path.read_text(encoding="utf-8")
        repeated = _repeated_key(yaml.compose(text, Loader=yaml.SafeLoader))
        value = yaml.safe_load(text)
    except OSError as problem:
        raise SpecError(f"{path}: cannot be read: {problem.strerror}", fix=fix, path=path) from None
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise SpecError(f"{path}: is no YAML of plain values: {problem}", fix=fix, path=path) from None
    if repeated is not None:
        raise SpecError(
            f"{path}, line {repeated.start_mark.line + 1}: {repeated.value!r} is there twice",
            fix="keep one of them",
            path=path,
            got=repeated.value,
        )
    if not isinstance(value, dict):
        raise SpecError(f"{path}: expected a mapping, got {type(value).__name__}", fix=fix, path=path)
    return value


def _repeated_key(node: Any, above: tuple[Any, ...] = ()) -> Any:
    """The first key that a mapping of the document has twice, of which YAML readers silently take the last."""
    if node is None or node.id == "scalar" or node in above:
        return None
    pairs = node.value if node.id == "mapping" else [(None, item) for item in node.value]
    seen: set[str] = set()
    for key, value in pairs:
        if key is not None and key.id == "scalar":
            if key.value in seen:
                return key
            seen.add(key.value)
        if (inner := _repeated_key(value, (*above, node))) is not None:
            return inner
    return None
