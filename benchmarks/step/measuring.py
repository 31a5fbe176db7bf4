"""What a step costs: seconds, resident memory, and, exactly, kernels, bytes moved and live bytes.

Needs nothing but torch, so that it runs beside any trainer.
"""

from __future__ import annotations

import argparse
import json
import time
import weakref
import zlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RANK = 16  # of every adapter
_VIEWS = {"set_", "detach", "_unsafe_view"}
_NO_KERNELS = _VIEWS | {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Counter(TorchDispatchMode):
    """Counts what reaches torch's kernels: each operator that is not a view is one kernel.

    The counts are exact and repeat on any machine: they depend on shapes alone.

    Attributes:
        kernels: calls.
        moved: bytes of their inputs and outputs.
        peak: most bytes that tensors made meanwhile held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.moved = self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = {_identity(tensor.untyped_storage()) for tensor in inputs}
        for tensor in outputs:
            if _identity(tensor.untyped_storage()) not in known:
                self._watch(tensor.untyped_storage())
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NO_KERNELS:
            self.kernels += 1
            self.moved += sum(tensor.nbytes for tensor in (*inputs, *outputs))
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = _identity(storage), storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _identity(storage: torch.UntypedStorage) -> int:
    return int(storage._cdata)  # noqa: SLF001 - data_ptr is 0 for every empty one


@dataclass(frozen=True)
class Resident:
    """The resident memory of this process above what it held at the beginning."""

    start: int

    @classmethod
    def from_now(cls) -> Resident:
        """Forget the peak so far."""
        Path("/proc/self/clear_refs").write_text("5")
        return cls(_status("VmRSS"))

    def peak(self) -> int:
        """Bytes."""
        return _status("VmHWM") - self.start


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def touch(model: torch.nn.Module) -> None:
    """Read every weight, so that those which lie in a mapped file are resident."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().sum()


def fill_adapters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Give every LoRA matrix values that depend on its name alone, B too; returns them by name."""
    adapters = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for name, parameter in adapters.items():
            seed = zlib.crc32(name.encode())
            parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
    return adapters


def adapter_gradients(
    model: torch.nn.Module, documents: Sequence[Any], loss_of: Callable[[Any], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Mean loss and adapter gradient of each of the first four documents."""
    adapters = fill_adapters(model)
    found: dict[str, torch.Tensor] = {}
    for index, document in enumerate(documents[:4]):
        loss = loss_of(document)
        gradients = torch.autograd.grad(loss, list(adapters.values()))
        found[f"{index}:loss"] = loss.detach()
        found |= {f"{index}:{name}": grad for name, grad in zip(adapters, gradients, strict=True)}
    return found


def documents_of(job: Path) -> list[dict[str, Any]]:
    """The tokens and labels of a job's documents."""
    return [json.loads(line) for line in (job / "documents.jsonl").read_text().splitlines()]


def arguments(description: str) -> argparse.Namespace:
    """What every side is called with."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--trainer", required=True)
    parser.add_argument("--measure", choices=["pass", "counts", "documents"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    return asked


def measured_pass(
    asked: argparse.Namespace, model: torch.nn.Module, run: Callable[[], Any], *, tokens: int, supervised: int
) -> dict[str, Any]:
    """What one pass over the documents cost."""
    touch(model)
    resident = Resident.from_now()
    if asked.measure == "counts":
        with Counter() as counter:
            run()
        return {
            "kernels": counter.kernels / supervised,
            "moved": counter.moved / supervised,
            "live": counter.peak,
        }
    start, cpu = time.perf_counter(), time.process_time()
    run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens": tokens,
        "rate": tokens / seconds,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "peak": resident.peak(),
    }
