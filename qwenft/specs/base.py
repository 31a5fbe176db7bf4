"""What every spec is: a frozen, hashable value that checks itself and names what is misspelt."""

from __future__ import annotations

import functools
import inspect
import math
import os
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from qwenft.display import html_table, html_view
from qwenft.errors import SpecError, nearest
from qwenft.family.roles import ROLES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

S = TypeVar("S", bound=type)


def spec(cls: S) -> S:
    """Make a frozen attrs class refuse misspelt arguments by name, and show what is not its default."""
    for name, attribute in list(vars(cls).items()):
        if isinstance(attribute, classmethod):
            setattr(cls, name, classmethod(checked(attribute.__func__, f"{cls.__name__}.{name}", cls)))
        elif inspect.isfunction(attribute) and not name.startswith("_"):
            setattr(cls, name, checked(attribute, f"{cls.__name__}.{name}"))
    cls.__init__ = checked(cls.__init__, cls.__name__, cls)  # type: ignore[misc]
    cls.__repr__ = _constructor  # type: ignore[assignment]
    cls._repr_html_ = _html  # type: ignore[attr-defined]
    return cls


def chosen(value: Any) -> list[tuple[str, Any]]:
    """The fields of an attrs value that are not what they are by default."""
    return [
        (field.name, getattr(value, field.name))
        for field in attrs.fields(type(value))
        if field.default is attrs.NOTHING or getattr(value, field.name) != _default(field)
    ]


def _default(field: attrs.Attribute[Any]) -> Any:
    default: Any = field.default
    return default.factory() if isinstance(default, attrs.Factory) else default  # type: ignore[arg-type]


def _constructor(value: Any) -> str:
    """The call that makes it."""
    arguments = ", ".join(f"{name}={held!r}" for name, held in chosen(value))
    return f"{type(value).__name__}({arguments})"


def _html(value: Any) -> str:
    rows = [(name, str(held) if isinstance(held, str) else repr(held)) for name, held in chosen(value)]
    left = len(attrs.fields(type(value))) - len(rows)
    rows += [("", f"and {left} by default")] if left else []
    return html_view(type(value).__name__, html_table((), rows))


def refuse_renamed(cls: type, names: Iterable[str], label: str | None = None) -> None:
    """Refuse arguments of other libraries and times that ``cls.RENAMED`` maps to what stands for them here.

    What ``cls.NOT_OFFERED`` names has nothing that stands for it.

    Raises:
        SpecError: one of ``names`` is such.
    """
    not_offered: Mapping[str, str] = getattr(cls, "NOT_OFFERED", {})
    for name in names:
        if name in not_offered:
            raise SpecError(
                f"{label or cls.__name__}({name}=...): {not_offered[name]} is not offered",
                fix=f"{label or cls.__name__}(), without {name}",
                got=name,
            )
    renamed: Mapping[str, str] = getattr(cls, "RENAMED", {})
    for name in names:
        if name in renamed:
            arguments = f"(...){renamed[name]}" if renamed[name].startswith(".") else f"({renamed[name]})"
            raise SpecError(
                f"{label or cls.__name__} has no argument {name!r}: it is written {renamed[name]}",
                fix=f"{label or cls.__name__}{arguments}",
                got=name,
                expected=renamed[name],
            )


def checked(function: Callable[..., Any], label: str, cls: type | None = None) -> Callable[..., Any]:
    """``function``, raising SpecError where its arguments do not fit its signature.

    Args:
        function: or a method.
        label: what messages call it.
        cls: whose ``RENAMED`` names arguments of other libraries and times.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if cls is not None:
            refuse_renamed(cls, [name for name in kwargs if name not in signature.parameters], label)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise _misfit(signature, label, kwargs, error) from None
        return function(*args, **kwargs)

    return call


def _misfit(signature: inspect.Signature, label: str, kwargs: dict[str, Any], error: TypeError) -> SpecError:
    known = [name for name in signature.parameters if name not in {"self", "cls"}]
    unknown = [name for name in kwargs if name not in known]
    if unknown:
        problem = f"{label} has no argument {unknown[0]!r}{nearest(unknown[0], known)}"
    else:
        problem = f"{label}: {error}"
    return SpecError(problem, fix=f"{label}({', '.join(known)})", got=unknown or kwargs, expected=tuple(known))


class Check:
    """A validator: a predicate, what it expects in words, and a line that satisfies it."""

    def __init__(self, accepts: Callable[[Any], bool], expected: str, example: str) -> None:
        self.accepts = accepts
        self.expected = expected
        self.example = example

    def __call__(self, instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        """Raise SpecError unless ``value`` is accepted."""
        if not self.accepts(value):
            place = f"{type(instance).__name__}.{attribute.name}"
            raise SpecError(
                f"{place}: expected {self.expected}, got {value!r}",
                fix=self.example,
                field=attribute.name,
                got=value,
                expected=self.expected,
            )

    def __repr__(self) -> str:
        return f"<expects {self.expected}>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def whole(example: str, *, low: int = 1, optional: bool = False) -> Check:
    """A whole number of at least ``low`` (or None)."""
    words = f"a whole number of at least {low}" + (" or None" if optional else "")
    return Check(lambda v: (optional and v is None) or (_is_whole(v) and v >= low), words, example)


def number(
    example: str, *, low: float = 0.0, high: float = math.inf, above: bool = False, optional: bool = False
) -> Check:
    """A finite number from ``low`` (excluded where ``above``) up to ``high``, which is excluded (or None)."""
    words = (f"a number above {low:g}" if above else f"a number of at least {low:g}") + (
        f" and below {high:g}" if high < math.inf else ""
    )

    def accepts(value: Any) -> bool:
        return (optional and value is None) or (
            _is_number(value) and (value > low if above else value >= low) and value < high
        )

    return Check(accepts, words + (" or None" if optional else ""), example)


def path_text(value: Any) -> Any:
    """A path as its string; what is neither is left for the validator."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def flag(example: str) -> Check:
    """True or False."""
    return Check(lambda v: isinstance(v, bool), "True or False", example)


def text(example: str, *, optional: bool = False) -> Check:
    """A string that is not empty (or None)."""
    words = "a string that is not empty" + (" or None" if optional else "")
    return Check(lambda v: (optional and v is None) or (isinstance(v, str) and v != ""), words, example)


def one_of(known: tuple[str, ...], example: str) -> Check:
    """One of some words."""
    return Check(lambda v: isinstance(v, str) and v in known, "one of " + ", ".join(map(repr, known)), example)


def kind_of(cls: type, example: str) -> Check:
    """An instance of ``cls``."""
    article = "an" if cls.__name__[0] in "AEIOU" else "a"
    return Check(lambda v: isinstance(v, cls), f"{article} {cls.__name__}", example)


def known_roles(roles: tuple[str, ...], method: str) -> tuple[str, ...]:
    """``roles`` without repetitions, or SpecError for one that the family does not have."""
    for role in roles:
        if role not in ROLES:
            raise SpecError(
                f"{method}: {role!r} is no role of the family{nearest(str(role), ROLES)}",
                fix=f"one of {', '.join(ROLES)}",
                got=role,
                expected=ROLES,
            )
    return tuple(dict.fromkeys(roles))
