"""Softmax attention by the flash-attention packages of Dao-AILab, versions 2, 3 and 4: for NVIDIA GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from packaging.version import Version

from qwenft.backends.requirements import Support, installed, unsupported_gpu, unsupported_problem
from qwenft.capabilities import AttentionBackend, Availability, Workspace
from qwenft.errors import BackendUnavailable, SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qwenft.capabilities import AttentionProblem
    from qwenft.kernels.layout import SequenceLayout
    from qwenft.machine import Machine


_FLOAT32 = 4


@attrs.frozen
class Release:
    """One of the packages.

    Args:
        distribution: its name on PyPI, or in its setup.py.
        source: what pip is to install.
        options: what pip is to be told besides, followed by a space.
        gpus: what it supports, by major compute capability.
    """

    distribution: str
    source: str
    options: str
    gpus: Mapping[int, Support]

    @property
    def install(self) -> str:
        """The line that installs it."""
        return f"pip install {self.options}{self.source}"

    def upgrade(self, since: str) -> str:
        """The line that installs this release or a newer one."""
        return f'pip install {self.options}"{self.distribution}>={since}"'


RELEASES: dict[int, Release] = {
    # csrc/flash_attn/flash_api.cpp and setup.py: head dim 256 backward on compute capability 8.6 and 8.9 since
    # 2.5.5, without dropout; code for 10.0 and 12.0 since 2.7.3.
    2: Release(
        distribution="flash-attn",
        source="flash-attn",
        options="--no-build-isolation ",  # its setup.py imports torch
        gpus={
            8: Support(256, since="2.5.5"),
            9: Support(256, since="2.5.5"),
            10: Support(256, since="2.7.3"),
            12: Support(256, since="2.7.3"),
        },
    ),
    # README.md names Hopper alone. hopper/setup.py builds code for 8.0 too, of which vLLM excludes 8.6 and 8.9.
    3: Release(
        distribution="flash_attn_3",
        source='"git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper"',
        options="--no-build-isolation ",
        gpus={9: Support(256)},
    ),
    # flash_attn/cute/interface.py: no backward on 8.x (_flash_attn_bwd). 9.0: head dim 256 with grouped heads
    # since pull request 2888; wrong gradients of queries off multiples of 32 (2896, open at 4.0.0b36). 10.x and
    # 11.x: a kernel for 256 alone, which read strided inputs wrongly until 2670. 12.x: tiles of 64 x 256 overflow
    # its 99 KB of shared memory (flash_bwd_sm120.py); arguments were compiled in wrongly until 2671.
    4: Release(
        distribution="flash-attn-4",
        source="flash-attn-4",
        options="",
        gpus={
            9: Support(256, step=32, since="4.0.0b31"),
            10: Support(128, step=32, also=(256,), since="4.0.0b20"),
            11: Support(128, step=32, also=(256,), since="4.0.0b20"),
            12: Support(128, step=32, since="4.0.0b21"),
        },
    ),
}


class FlashAttention(AttentionBackend):
    """flash-attention: one call for the whole stream, which is told where documents begin.

    Args:
        version: 2 (flash-attn, for GPUs from Ampere on), 3 (flash_attn_3, Hopper) or 4 (flash-attn-4, Hopper and
            Blackwell).

    Raises:
        SpecError: another version.

    Examples:
        >>> FlashAttention(3).name
        'flash_attention_3'
    """

    supports_packing = True
    uses_flash_lib = True
    needs_half_precision = True
    traceable = False

    def __init__(self, version: int = 2) -> None:
        if type(version) is not int or version not in RELEASES:
            raise SpecError(
                f"FlashAttention: there are versions {', '.join(map(str, RELEASES))}, got {version!r}",
                fix="FlashAttention(2)",
                got=version,
                expected=tuple(RELEASES),
            )
        self.version = version

    @property
    def name(self) -> str:
        """The name that plans and messages use."""
        return f"flash_attention_{self.version}"

    def availability(self, machine: Machine) -> Availability:
        """On the GPUs that the package is for, in a release that is right there for this family's head dim."""
        release = RELEASES[self.version]
        if (reason := unsupported_gpu(machine, release.gpus)) is not None:
            return Availability(usable=False, reason=reason)
        found = installed(release.distribution, machine)
        if found is None:
            return Availability(
                usable=False, reason=f"{release.distribution} is not installed", remedy=release.install
            )
        capability = machine.compute_capability
        since = None if capability is None else release.gpus[capability[0]].since
        if since is not None and found < Version(since):
            reason = f"it needs {release.distribution} {since} or newer on this GPU, found {found}"
            return Availability(usable=False, reason=reason, remedy=release.upgrade(since))
        return Availability(usable=True)

    def refuses(self, problem: AttentionProblem) -> str | None:
        """Other devices than a GPU, and head dims that have no kernel on the GPU."""
        return unsupported_problem(problem, RELEASES[self.version].gpus)

    def saved_tensors(self, problem: AttentionProblem) -> dict[str, int]:
        """The log of the softmax's sum of each head and token, in float32."""
        return {"log of the sum": _FLOAT32 * problem.query_heads * sum(problem.lengths)}

    def workspace(self, problem: AttentionProblem) -> Workspace:
        """Of backward: the query's gradient in float32, and those of key and value for every query head.

        csrc/flash_attn/flash_api.cpp, mha_varlen_bwd, of version 2, whose buffers round each document up to 128
        tokens. 3 and 4 add up the gradients of key and value in float32 by their own heads, which is less.
        """
        rounded = sum(problem.lengths) + 128 * len(problem.lengths)
        of_query = problem.query_heads * rounded * (problem.head_dim + 1) * _FLOAT32
        is_grouped = problem.query_heads != problem.key_value_heads
        expanded = 2 * sum(problem.lengths) * problem.query_heads * problem.head_dim * 2 * is_grouped
        return Workspace(backward=of_query + expanded)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: SequenceLayout,
        scale: float,
        causal: bool = True,
    ) -> Tensor:
        """Attend by :func:`qwenft.kernels.flash.varlen_attention`, whose arguments these are.

        Raises:
            BackendUnavailable: the package is not installed, or does not load.
        """
        from qwenft.kernels.flash import packaged_function, varlen_attention

        try:
            function = packaged_function(self.version)
        except ImportError as error:
            raise BackendUnavailable(
                f"{self.name} cannot be loaded: {error}", fix=RELEASES[self.version].install
            ) from error
        return varlen_attention(function, query, key, value, layout=layout, scale=scale, causal=causal)
