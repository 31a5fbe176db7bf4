"""Fine-tune the Qwen3.5 family from a notebook or a research script.

Say what you want with specs, ``compile()`` them to a plan, read it, and ``train()``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenft.axolotl import from_axolotl
    from qwenft.capabilities import AttentionBackend, LinearAttentionBackend
    from qwenft.errors import (
        BackendUnavailable,
        CheckpointError,
        ConformanceError,
        DamagedError,
        DataError,
        LeakError,
        NonFiniteError,
        OutOfMemoryError,
        PlanError,
        QwenftError,
        RankError,
        SpecError,
    )
    from qwenft.known_recipes import preset, presets
    from qwenft.machine import Machine
    from qwenft.merging import merge_adapter
    from qwenft.recipe import Recipe
    from qwenft.run import Run, open_run
    from qwenft.specs.adapter import AdapterSpec
    from qwenft.specs.attention import AttentionSpec
    from qwenft.specs.data import DataSpec
    from qwenft.specs.model import ModelSpec
    from qwenft.specs.parallel import ParallelSpec
    from qwenft.specs.training import TrainingSpec
    from qwenft.trackers import Tracker
    from qwenft.training_plan import TrainingPlan

__version__ = "0.1.0"

_HOMES = {
    "AdapterSpec": "qwenft.specs.adapter",
    "AttentionBackend": "qwenft.capabilities",
    "AttentionSpec": "qwenft.specs.attention",
    "BackendUnavailable": "qwenft.errors",
    "CheckpointError": "qwenft.errors",
    "ConformanceError": "qwenft.errors",
    "DamagedError": "qwenft.errors",
    "DataError": "qwenft.errors",
    "DataSpec": "qwenft.specs.data",
    "LeakError": "qwenft.errors",
    "LinearAttentionBackend": "qwenft.capabilities",
    "Machine": "qwenft.machine",
    "ModelSpec": "qwenft.specs.model",
    "NonFiniteError": "qwenft.errors",
    "OutOfMemoryError": "qwenft.errors",
    "ParallelSpec": "qwenft.specs.parallel",
    "PlanError": "qwenft.errors",
    "QwenftError": "qwenft.errors",
    "RankError": "qwenft.errors",
    "Recipe": "qwenft.recipe",
    "Run": "qwenft.run",
    "SpecError": "qwenft.errors",
    "Tracker": "qwenft.trackers",
    "TrainingPlan": "qwenft.training_plan",
    "TrainingSpec": "qwenft.specs.training",
    "from_axolotl": "qwenft.axolotl",
    "merge_adapter": "qwenft.merging",
    "open_run": "qwenft.run",
    "preset": "qwenft.known_recipes",
    "presets": "qwenft.known_recipes",
}
_MODULES = ("backends", "family", "testing", "trackers")

__all__ = [
    "AdapterSpec",
    "AttentionBackend",
    "AttentionSpec",
    "BackendUnavailable",
    "CheckpointError",
    "ConformanceError",
    "DamagedError",
    "DataError",
    "DataSpec",
    "LeakError",
    "LinearAttentionBackend",
    "Machine",
    "ModelSpec",
    "NonFiniteError",
    "OutOfMemoryError",
    "ParallelSpec",
    "PlanError",
    "QwenftError",
    "RankError",
    "Recipe",
    "Run",
    "SpecError",
    "Tracker",
    "TrainingPlan",
    "TrainingSpec",
    "__version__",
    "from_axolotl",
    "merge_adapter",
    "open_run",
    "preset",
    "presets",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import qwenft`` loads nothing heavy."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"qwenft.{name}")
    msg = f"module 'qwenft' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return [*__all__, *_MODULES]
