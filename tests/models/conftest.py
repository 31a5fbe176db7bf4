from __future__ import annotations

import sys

import pytest


@pytest.fixture
def without_fla(monkeypatch):
    """Stock transformers on its own torch code: with FLA importable and no GPU its forward fails."""
    for name in ("qwen3_5", "qwen3_5_moe"):
        module = sys.modules[f"transformers.models.{name}.modeling_{name}"]
        for function in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"):
            current = getattr(module, function)
            monkeypatch.setattr(module, function, getattr(current, "__wrapped__", current))
