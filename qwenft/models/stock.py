"""The modules of transformers that hold the family."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # They import FLA where it is installed, which warns without a GPU; the plan says what is used instead.
    warnings.filterwarnings("ignore", "Triton is not supported on current platform", UserWarning)
    from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

__all__ = ["dense", "moe"]
