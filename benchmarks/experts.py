"""Routed experts, forward and backward, against those of transformers; in 4 bits against 16.

One thread: `python benchmarks/experts.py`. The sides take turns in one process; the ratio of each turn, its median
and range. Peaks of memory are taken in a process a side.
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.models.qwen3_5_moe import configuration_qwen3_5_moe as configuration
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

from qwenft.kernels.experts import routed_experts
from qwenft.kernels.quantized import quantize_experts
from qwenft.training.allocator import keep_freed_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

EXPERTS, PER_TOKEN, TOKENS = 64, 8, 2048
SIZES = ((512, 256), (1024, 512))  # hidden, of an expert
#: (ours, the other, whether the experts are trained, turns).
PAIRS = (
    ("float32", "eager", False, 9),
    ("float32", "grouped_mm", False, 9),
    ("float32", "eager", True, 2),
    ("float32", "grouped_mm", True, 5),
    ("nf4", "bfloat16", False, 9),
    ("int8", "bfloat16", False, 9),
)


def step(side: str, hidden: int, width: int, *, trained: bool) -> Callable[[], Any]:
    """Forward and backward of one side."""
    torch.manual_seed(0)
    shapes = ((EXPERTS, 2 * width, hidden), (EXPERTS, hidden, width))
    stacks: list[Tensor] = [torch.randn(shape) * shape[2] ** -0.5 for shape in shapes]
    x = torch.randn(TOKENS, hidden, requires_grad=True)
    scores, chosen = torch.randn(TOKENS, EXPERTS).softmax(-1).topk(PER_TOKEN)
    weights = (scores / scores.sum(-1, keepdim=True)).requires_grad_()
    grad = torch.randn(TOKENS, hidden)
    if side in ("eager", "grouped_mm"):
        config = configuration.Qwen3_5MoeTextConfig(
            num_experts=EXPERTS, num_experts_per_tok=PER_TOKEN, hidden_size=hidden, moe_intermediate_size=width
        )
        config._experts_implementation = side  # noqa: SLF001 - the one that experts alone are told by
        with torch.device("meta"):
            experts = moe.Qwen3_5MoeExperts(config)
        experts.gate_up_proj, experts.down_proj = (torch.nn.Parameter(stack, trained) for stack in stacks)
        inputs = (x, weights, *(p for p in experts.parameters() if p.requires_grad))
        return lambda: torch.autograd.grad(experts(x, chosen, weights), inputs, grad)
    if side in ("nf4", "int8"):
        stacks = [quantize_experts(stack, stack.shape, side, double_quant=True) for stack in stacks]
    elif side == "bfloat16":
        stacks = [stack.bfloat16() for stack in stacks]
    held = [stack.requires_grad_() if trained else stack for stack in stacks]
    inputs = (x, weights, *(held if trained else ()))
    return lambda: torch.autograd.grad(routed_experts(x, chosen, weights, *held), inputs, grad)


def seconds(run: Callable[[], Any]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def status(name: str) -> float:
    """MiB of memory that this process has, or had at the most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def peak(side: str, hidden: int, width: int, *, trained: bool) -> float:
    """MiB that a step of one side takes at the most beyond what it begins with."""
    run = step(side, hidden, width, trained=trained)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is that from here on
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def peak_alone(side: str, hidden: int, width: int, *, trained: bool) -> float:
    """The same, in a process of its own."""
    command = [sys.executable, __file__, "peak", side, str(hidden), str(width), *(["trained"] if trained else [])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603 - this file


def compare(hidden: int, width: int) -> None:
    """Print a line a pair for experts of one size."""
    print(f"{EXPERTS} experts of {width}, {PER_TOKEN} a token, {TOKENS:,} tokens of {hidden}, one thread")
    for ours, other, trained, turns in PAIRS:
        sides = [step(side, hidden, width, trained=trained) for side in (ours, other)]
        for run in sides:
            run()
        times = [[seconds(run) for run in sides] for _ in range(turns)]
        ratios = [mine / its for mine, its in times]
        peaks = [peak_alone(side, hidden, width, trained=trained) for side in (ours, other)]
        print(
            f"{'trained' if trained else 'frozen'} {ours} against {other}: time "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of "
            f"{statistics.median(its for _, its in times):.2f} s; peak {peaks[0]:.0f} against {peaks[1]:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["peak"]:
        print(peak(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), trained="trained" in sys.argv))
    else:
        keep_freed_memory()  # as every run on a CPU does
        for size in SIZES:
            compare(*size)
