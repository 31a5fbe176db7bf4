"""Which checkpoint is trained."""

from __future__ import annotations

import os
from typing import Any

import attrs

from qwenft.specs.base import Check, flag, spec, text

DTYPES = ("bfloat16", "float32")


def _path(source: Any) -> Any:
    """A path as its string; what is neither is left for the validator."""
    return os.fspath(source) if isinstance(source, os.PathLike) else source


_DTYPE = Check(
    lambda value: isinstance(value, str) and value in DTYPES,
    "one of 'bfloat16', 'float32' (float16 overflows in Gated DeltaNet: its gradients are NaN)",
    'ModelSpec(..., dtype="bfloat16")',
)


@spec
@attrs.frozen
class ModelSpec:
    """A checkpoint and how its frozen weights are held.

    Args:
        source: a checkpoint folder, a hub id, or a family name such as "qwen3.5-27b".
        revision: the hub's branch, tag or commit.
        dtype: the dtype in which weights that are not trained are held. Trained weights are float32.
        vision: load the vision tower too; without it only the text half is read.

    Examples:
        >>> ModelSpec("Qwen/Qwen3.5-4B").text_only().with_dtype("float32").dtype
        'float32'
    """

    source: str = attrs.field(converter=_path, validator=text('ModelSpec("Qwen/Qwen3.5-4B")'))
    revision: str | None = attrs.field(
        default=None, kw_only=True, validator=text('ModelSpec(..., revision="main")', optional=True)
    )
    dtype: str = attrs.field(default="bfloat16", kw_only=True, validator=_DTYPE)
    vision: bool = attrs.field(default=False, kw_only=True, validator=flag("ModelSpec(...).with_vision()"))

    def text_only(self) -> ModelSpec:
        """Leave the vision tower on disk."""
        return attrs.evolve(self, vision=False)

    def with_vision(self) -> ModelSpec:
        """Load the vision tower too."""
        return attrs.evolve(self, vision=True)

    def with_dtype(self, dtype: str) -> ModelSpec:
        """Hold frozen weights in "bfloat16" or "float32"."""
        return attrs.evolve(self, dtype=dtype)
