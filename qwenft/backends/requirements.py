"""What backends need of a machine: GPUs, head dims, and distributions that are installed and new enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from packaging.version import Version

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qwenft.capabilities import AttentionProblem
    from qwenft.machine import Machine


@attrs.frozen
class Support:
    """The head dims that kernels take on GPUs of one major compute capability, forward and backward.

    Args:
        head_dim: the largest.
        step: what smaller ones are a multiple of.
        also: larger ones that are taken.
        since: the release from which on this holds, or None where any will do.
    """

    head_dim: int
    step: int = 8
    also: tuple[int, ...] = ()
    since: str | None = None

    def takes(self, head_dim: int) -> bool:
        """Whether there are kernels for this head dim."""
        return head_dim in self.also or (head_dim <= self.head_dim and head_dim % self.step == 0)

    def __str__(self) -> str:
        return ", ".join([f"multiples of {self.step} up to {self.head_dim}", *map(str, self.also)])


def installed(distribution: str, machine: Machine) -> Version | None:
    """The version of a distribution that is installed on a machine, or None."""
    found = machine.version_of(distribution)
    return None if found is None else Version(found)


def before_ampere(machine: Machine) -> str | None:
    """Why a GPU is too old for Triton's kernels in bfloat16, or None where it is not."""
    capability = machine.compute_capability or (0, 0)
    if capability >= (8, 0):
        return None
    return f"it needs compute capability 8.0 or more, the GPU has {capability_text(capability)}"


def unsupported_gpu(machine: Machine, gpus: Mapping[int, Support]) -> str | None:
    """Why kernels for these GPUs do not run on ``machine``, or None where they do.

    Args:
        machine: where.
        gpus: what is supported, by major compute capability.
    """
    if machine.device != "cuda":
        return "it needs an NVIDIA GPU"
    capability = machine.compute_capability
    if capability is None or capability[0] in gpus:
        return None
    known = ", ".join(f"{major}.x" for major in gpus)
    return f"it is for compute capability {known}, the GPU has {capability_text(capability)}"


def unsupported_problem(problem: AttentionProblem, gpus: Mapping[int, Support]) -> str | None:
    """Why kernels for these GPUs cannot compute ``problem``, or None where they can.

    Args:
        problem: what a layer asks; where its compute capability is not known, or not supported at all, it is
            measured by what some GPU can.
        gpus: what is supported, by major compute capability.
    """
    if problem.device != "cuda":
        return f"it computes on NVIDIA GPUs only, not on {problem.device!r}"
    capability = problem.compute_capability
    if capability is not None and capability[0] in gpus:
        support, place = gpus[capability[0]], f" on compute capability {capability_text(capability)}"
    else:
        support, place = max(gpus.values(), key=lambda each: each.head_dim), ""
    if support.takes(problem.head_dim):
        return None
    return f"head dim {problem.head_dim}: it takes {support}{place}"


def capability_text(capability: tuple[int, int]) -> str:
    """A compute capability as NVIDIA writes it: "9.0"."""
    return ".".join(map(str, capability))
