"""Optimizers of torch and bitsandbytes over groups of parameters, and learning-rate schedules."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch

from qwenft.training.rounding import StochasticRounding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from qwenft.specs.training import TrainingSpec

DECAY_RATIO = 0.1
_SPARED = ("A_log", "dt_bias")
_LORA_B = (".lora_B.", ".lora_embedding_B.")
_BITSANDBYTES = {
    "adamw_8bit": bitsandbytes.optim.AdamW8bit,
    "paged_adamw": bitsandbytes.optim.PagedAdamW,
    "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
}


def build_optimizer(
    named_parameters: Iterable[tuple[str, Any]], training: TrainingSpec, role_of: Callable[[str], str]
) -> torch.optim.Optimizer:
    """The recipe's optimizer over the parameters that are trained; bfloat16 ones are rounded stochastically.

    Args:
        named_parameters: of the model; frozen ones are left out.
        training: rates, decay and the optimizer's own numbers.
        role_of: the role of a parameter's name.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            rate = training.learning_rate_of(role_of(name))
            if any(part in name for part in _LORA_B):
                rate *= training.lora_plus_ratio
            bare = parameter.ndim < 2 or name.endswith(_SPARED)
            groups.setdefault((rate, 0.0 if bare else training.weight_decay), []).append(parameter)
    optimizer = _make(
        [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()],
        training,
    )
    rounded = any(p.dtype == torch.bfloat16 for params in groups.values() for p in params)
    return StochasticRounding(optimizer) if rounded else optimizer


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
    start = warmup
    if training.schedule == "warmup_stable_decay":
        start = max(warmup, steps - math.ceil((training.decay_ratio or DECAY_RATIO) * steps))
    progress = min(1.0, max(0, step - start) / max(1, steps - start))
    left = {
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "linear": 1.0 - progress,
        "constant": 1.0,
        "warmup_stable_decay": 1.0 - math.sqrt(progress),
    }[training.schedule]
    return training.floor_ratio + (1.0 - training.floor_ratio) * left


def _make(groups: list[dict[str, Any]], training: TrainingSpec) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=training.momentum)
    numbers: dict[str, Any] = {"betas": training.betas, "eps": training.epsilon}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **numbers)
    return _BITSANDBYTES[training.optimizer](groups, **numbers)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What an optimizer keeps of each parameter, by "name:key": tensors, and plain numbers."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                # bitsandbytes shares its quantization maps, and a file holds no two views of one storage.
                tensors[f"{name}:{key}"] = value.clone() if key.startswith("qmap") else value
            else:
                numbers[f"{name}:{key}"] = value
    return tensors, numbers


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], state: Mapping[str, Any]
) -> None:
    """Give an optimizer the state that :func:`optimizer_state` took, to the bit.

    ``load_state_dict`` would cast moments to the dtype of their parameters.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    by_name: dict[str, dict[str, Any]] = {}
    for place, value in state.items():
        name, _, key = place.rpartition(":")
        by_name.setdefault(name, {})[key] = value
    optimizer.state.clear()
    maker = optimizer.optimizer if isinstance(optimizer, StochasticRounding) else optimizer
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            values = by_name.get(names[parameter], {})
            if values and isinstance(maker, bitsandbytes.optim.optimizer.Optimizer8bit):
                maker.init_state(
                    group, parameter, group_index, index
                )  # paged moments are allocated in its own way
            kept = optimizer.state[parameter]
            for key, value in values.items():
                if not isinstance(value, torch.Tensor):
                    kept[key] = value
                elif key in kept:
                    kept[key].copy_(value)
                else:
                    kept[key] = value.to(parameter.device)
