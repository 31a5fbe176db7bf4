"""Optimizers and learning-rate schedules, from torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qwenft.specs.training import TrainingSpec

_SPARED = ("A_log", "dt_bias")


def build_optimizer(named_parameters: Iterable[tuple[str, Any]], training: TrainingSpec) -> torch.optim.Optimizer:
    """AdamW over the parameters that are trained; weight decay on matrices alone."""
    decayed: list[torch.nn.Parameter] = []
    spared: list[torch.nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            bare = parameter.ndim < 2 or name.endswith(_SPARED)
            (spared if bare else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=training.learning_rate)


def build_schedule(
    optimizer: torch.optim.Optimizer, training: TrainingSpec, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate of every step: a linear warmup, then the schedule's own course."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, training=training, steps=steps)
    )


def learning_rate_factor(step: int, *, training: TrainingSpec, steps: int) -> float:
    """The share of the peak learning rate that step ``step`` (from 0) of ``steps`` takes."""
    warmup = math.ceil(training.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if training.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if training.schedule == "linear" else 1.0
