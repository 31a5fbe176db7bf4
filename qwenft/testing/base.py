"""The tiny base that ships with the package."""

from __future__ import annotations

from pathlib import Path


def tiny_base() -> Path:
    """A tiny checkpoint of the family that has learned the tasks of ``qwenft.testing.skills``.

    ``scripts/tiny_base.py`` made it; ``skills.json`` in it says how many tasks that it never saw it answers. Its
    vision tower and its multi-token-prediction layer are as they were drawn.

    Returns:
        The folder.
    """
    return Path(__file__).with_name("tiny_base")
