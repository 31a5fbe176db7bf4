"""The trained parameters of a model, and of each the part that this process updates."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, Shard

from qwenft.models.bind import causal_of
from qwenft.plan.records import accumulates

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qwenft.specs.training import TrainingSpec
    from qwenft.training.ranks import Ranks

#: The attribute of a sharded model with the scales of its quantized weights.
SCALES = "qwenft_scales"
#: Of moments in 8 bits the scales of blocks, which each process has of its own.
_OWN_OF_PROCESS = "absmax"


class Trained:
    """What an optimizer sees: plain tensors, of which it need not know that others hold the rest.

    Args:
        model: of any kind.
        training: how gradients are held.
        ranks: the processes.

    Attributes:
        parameters: of the model, by name.
        parts: of each what this process updates: a shard of it, which shares its memory, or itself.
        whole: those beside sharded ones that every process holds; nobody else adds up their gradients.
        is_sharded: this process has but parts of the model.
    """

    def __init__(self, model: Any, training: TrainingSpec, ranks: Ranks) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parts = {name: _part(p, training) for name, p in self.parameters.items()}
        self._ranks = ranks
        self.is_sharded = any(isinstance(p, DTensor) for p in model.parameters())
        self._sharded: dict[str, Any] = {n: p for n, p in self.parameters.items() if isinstance(p, DTensor)}
        self.whole = [p for name, p in self.parameters.items() if self.is_sharded and name not in self._sharded]
        for name, parameter in self._sharded.items():
            # At once: the sums in float32 and all of a pass's gradients in bfloat16 never exist together.
            parameter.register_post_accumulate_grad_hook(partial(_take_gradient, part=self.parts[name]))

    @torch.no_grad()
    def sum_whole(self) -> None:
        """Add up over all processes the gradients of what each of them holds whole."""
        for parameter in self.whole:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._ranks.sum_tensor(parameter.grad)

    def norm(self) -> torch.Tensor:
        """Of all gradients together."""
        held = {name: part.grad for name, part in self.parts.items() if part.grad is not None}
        whole = torch.nn.utils.get_total_norm([grad for name, grad in held.items() if name not in self._sharded])
        shards = torch.nn.utils.get_total_norm([grad for name, grad in held.items() if name in self._sharded])
        return self.total_norm(whole, shards)

    def total_norm(self, whole: torch.Tensor, shards: torch.Tensor) -> torch.Tensor:
        """Of all gradients, of the norms of those that every process has and of its parts of the others."""
        if not self._sharded:
            return whole
        mesh = next(iter(self._sharded.values())).device_mesh
        # Where the model is repeated over nodes, every part is summed once for each of them.
        copies = mesh.size(0) if mesh.ndim == 2 else 1
        total = self._ranks.sum_tensor(shards.double().square()) / copies
        return (total + whole.to(total).square()).sqrt().float()

    @property
    def averaged_over(self) -> int:
        """By what the sum of the gradients has been divided: DistributedDataParallel averages them."""
        return 1 if self.is_sharded else self._ranks.count

    def to_write(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What this process is to write of tensors, by names such as "parameter" or "parameter:moment"."""
        found = {}
        for key, tensor in tensors.items():
            name, _, kind = key.partition(":")
            if self._is_part(name, tensor.shape):
                if tensor.numel() and self._is_first_copy(name):
                    found[key] = tensor
            elif name in self._sharded and kind.startswith(_OWN_OF_PROCESS):
                found[f"{key}.{self._ranks.rank}"] = tensor
            elif self._ranks.is_first:
                found[key] = tensor
        return found

    def starts(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Of those of :meth:`to_write` that are parts, the row with which they begin."""
        names = {key: key.partition(":")[0] for key in tensors}
        return {
            key: rows_of(self.parameters[name]).start
            for key, name in names.items()
            if self._is_part(name, tensors[key].shape)
        }

    def like(self, moments: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, torch.Tensor]:
        """Room for what this process needs of moments with these shapes, by the names of :meth:`to_write`."""
        found = {}
        for key, (shape, dtype) in moments.items():
            name, _, kind = key.partition(":")
            parameter = self.parameters[name]
            if name in self._sharded and shape == parameter.shape:
                found[key] = torch.empty_like(parameter, dtype=dtype)
            elif not (name in self._sharded and kind.startswith(_OWN_OF_PROCESS)) or key.endswith(
                f".{self._ranks.rank}"
            ):
                found[key] = torch.empty(shape, dtype=dtype)
        return found

    def of_process(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This process's parts of tensors, by the names that it knows them by."""
        own = f".{self._ranks.rank}"
        return {
            key.removesuffix(own) if key.partition(":")[2].startswith(_OWN_OF_PROCESS) else key: local_of(tensor)
            for key, tensor in tensors.items()
        }

    def _is_part(self, name: str, shape: torch.Size) -> bool:
        return name in self._sharded and shape == self.parts[name].shape

    def _is_first_copy(self, name: str) -> bool:
        mesh = self._sharded[name].device_mesh
        return mesh.ndim == 1 or mesh.get_local_rank(0) == 0


def _take_gradient(parameter: torch.Tensor, part: torch.Tensor) -> None:
    """Add the gradient of a sharded parameter to that of its part."""
    assert isinstance(parameter.grad, DTensor)
    gradient = parameter.grad.to_local()
    parameter.grad = None
    part.grad = gradient.to(part.grad_dtype or part.dtype) if part.grad is None else part.grad.add_(gradient)


def rows_of(parameter: torch.Tensor) -> slice:
    """Which rows of a parameter are this process's."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    place = parameter.placements.index(Shard(0))
    parts, part = parameter.device_mesh.size(place), parameter.device_mesh.get_local_rank(place)
    size = -(-len(parameter) // parts)
    rows = slice(min(part * size, len(parameter)), min((part + 1) * size, len(parameter)))
    assert rows.stop - rows.start == len(parameter.to_local())
    return rows


@torch.no_grad()
def local_of(parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter, which shares its memory."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.data


def _part(parameter: torch.nn.Parameter, training: TrainingSpec) -> torch.nn.Parameter:
    if not isinstance(parameter, DTensor):
        return parameter
    part = torch.nn.Parameter(local_of(parameter))
    if accumulates(training):
        part.grad_dtype = torch.float32
    return part


def state_bytes(
    model: Any, parts: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, *, in_backward: bool
) -> int:
    """The bytes of what this process holds from step to step: weights, their scales, gradients and moments.

    Gradients are counted as they are at the end of backward, whether they are there at the moment or not; the
    largest alone where the optimizer steps ``in_backward``.
    """
    weights = sum(local_of(parameter).nbytes for parameter in model.parameters())
    scales = sum(map(_scale_bytes, scales_of(model)))
    gradients = [part.numel() * (part.grad_dtype or part.dtype).itemsize for part in parts.values()]
    moments = sum(
        value.nbytes
        for kept in optimizer.state.values()
        for key, value in kept.items()
        if isinstance(value, torch.Tensor) and not key.startswith("qmap")  # which all share
    )
    return weights + scales + moments + (max if in_backward else sum)(gradients)


def scales_of(model: Any) -> list[Any]:
    """What is kept beside the quantized weights of a model."""
    beside = getattr(causal_of(model), SCALES, None)
    if beside is not None:
        return [held for _, _, held in beside]
    kept = (getattr(p, kind, None) for p in model.parameters() for kind in ("quant_state", "SCB"))
    return [held for held in kept if held is not None]


def _scale_bytes(held: Any) -> int:
    if isinstance(held, torch.Tensor):
        return held.nbytes
    nested = 0 if held.state2 is None else held.state2.absmax.nbytes + held.offset.nbytes
    return int(held.absmax.nbytes + nested)
