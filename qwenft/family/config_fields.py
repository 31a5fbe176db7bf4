"""Typed reading of a parsed config.json, so that a wrong field is named by its full path."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from qwenft.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


#: No size of a model is larger; what is would fill the memory before a weight is read.
_LARGEST = 2**24
_FIX = "config.json as the checkpoint was published"


@attrs.frozen(eq=False)
class ConfigFields:
    """The fields of one JSON object; an absent field and a null are the same, as in transformers.

    Args:
        values: the parsed object.
        source: what messages call the checkpoint.
        prefix: the path of this object in the file, such as "text_config.".
    """

    values: Mapping[str, Any]
    source: str
    prefix: str = ""

    def integer(self, key: str, default: int, most: int = _LARGEST) -> int:
        """The positive integer of at most ``most`` at ``key``, or ``default`` where the file leaves it out."""
        found = int(self._checked(key, default, _is_positive_integer, "a positive integer"))
        if found > most:
            raise self.wrong(key, f"at most {most:,}")
        return found

    def count(self, key: str, default: int) -> int:
        """The integer of at least 0 at ``key``, or ``default`` where the file leaves it out."""
        return int(self._checked(key, default, _is_count, "an integer of at least 0"))

    def number(self, key: str, default: float) -> float:
        """The positive number at ``key``, or ``default`` where the file leaves it out."""
        return float(self._checked(key, default, _is_positive_number, "a positive number"))

    def boolean(self, key: str, *, default: bool) -> bool:
        """The truth value at ``key``, or ``default`` where the file leaves it out."""
        return bool(self._checked(key, default, _is_boolean, "true or false"))

    def integers(self, key: str, default: Sequence[int]) -> tuple[int, ...]:
        """The list of positive integers at ``key``, or ``default`` where the file leaves it out."""
        return tuple(self._checked(key, default, _is_integer_list, "a list of positive integers"))

    def strings(self, key: str) -> tuple[str, ...] | None:
        """The list of strings at ``key``, or None where the file leaves it out."""
        found = self._checked(key, None, _is_string_list, "a list of strings")
        return None if found is None else tuple(found)

    def text(self, key: str) -> str:
        """The string at ``key``, which must be there."""
        return str(self._required(key, _is_string, "a string"))

    def section(self, key: str) -> ConfigFields:
        """The JSON object at ``key``, which must be there."""
        return self._inside(key, self._required(key, _is_object, "an object"))

    def optional_section(self, key: str) -> ConfigFields:
        """The JSON object at ``key``, or an empty one where the file leaves it out."""
        return self._inside(key, self._checked(key, {}, _is_object, "an object"))

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """The error that says what stands at ``key`` and what was expected there."""
        got = self.values.get(key)
        path = f"{self.prefix}{key}"
        msg = f"{self.source}: {path} in config.json is {got!r:.200}; expected {expected}"
        return CheckpointError(msg, fix=_FIX, source=self.source, field=path, got=got, expected=expected)

    def _inside(self, key: str, values: Any) -> ConfigFields:
        return ConfigFields(values, self.source, f"{self.prefix}{key}.")

    def _checked(self, key: str, default: Any, accepts: Callable[[Any], bool], expected: str) -> Any:
        found = self.values.get(key)
        if found is None:
            return default
        if not accepts(found):
            raise self.wrong(key, expected)
        return found

    def _required(self, key: str, accepts: Callable[[Any], bool], expected: str) -> Any:
        found = self._checked(key, None, accepts, expected)
        if found is None:
            path = f"{self.prefix}{key}"
            msg = f"{self.source}: config.json has no {path}; expected {expected}"
            raise CheckpointError(msg, fix=_FIX, source=self.source, field=path, got=None, expected=expected)
        return found


# bool is a subclass of int, and a JSON true where a size belongs is a mistake.
def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_positive_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_integer_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_positive_integer(item) for item in value)


def _is_string_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
