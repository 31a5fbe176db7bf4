"""How two JSON values differ."""

from __future__ import annotations

from typing import Any


def differences(
    saved: Any, present: Any, place: str = "", *, names: tuple[str, str] = ("there", "here")
) -> list[str]:
    """The places at which two JSON values differ, and what stands there in both, which ``names`` are for."""
    if isinstance(saved, dict) and isinstance(present, dict):
        found = []
        for key in [*saved, *(key for key in present if key not in saved)]:
            inner = f"{place}.{key}" if place else key
            found += differences(saved.get(key), present.get(key), inner, names=names)
        return found
    return [] if saved == present else [f"{place}: {saved!r} {names[0]}, {present!r} {names[1]}"]
