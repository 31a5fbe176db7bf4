"""Gated DeltaNet by flash-linear-attention (FLA): Triton kernels for NVIDIA GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from packaging.version import Version

from qwenft.backends.requirements import before_ampere, installed
from qwenft.capabilities import Availability, LinearAttentionBackend, Workspace

if TYPE_CHECKING:
    from torch import Tensor

    from qwenft.capabilities import LinearAttentionProblem
    from qwenft.kernels.layout import SequenceLayout
    from qwenft.machine import Machine


@attrs.frozen
class _Needed:
    """A distribution that must be installed.

    Args:
        distribution: its name.
        oldest: the first version that will do.
        why: what is wrong with older ones.
    """

    distribution: str
    oldest: str
    why: str


NEEDED = (
    _Needed("flash-linear-attention", "0.6", "older ones have other functions"),
    _Needed("triton", "3.5", "FLA 0.6 does not import with older ones"),
)
#: FLA raises too, but only in the first backward pass (fla-org/flash-linear-attention#640 and #983).
NEEDED_ON_HOPPER = (
    *NEEDED,
    _Needed("triton", "3.7.1", "older ones miscompile its backward pass for Hopper, and gradients are wrong"),
)
_CHUNK, _FLOAT32 = 64, 4
_ITEM_BYTES = {"bfloat16": 2, "float32": 4}
#: What the state's kernels assert (fla.ops.common.chunk_delta_h).
LARGEST_KEY_DIM = 256


class FlaDeltaRule(LinearAttentionBackend):
    """The chunked rule and the convolution of FLA, which is told where documents begin in both."""

    name = "fla"
    supports_packing = True
    uses_flash_lib = False
    traceable = False

    def availability(self, machine: Machine) -> Availability:
        """On GPUs from Ampere on, with versions of FLA and Triton that are not known to be wrong there."""
        if machine.device != "cuda":
            return Availability(usable=False, reason="it needs an NVIDIA GPU")
        if (reason := before_ampere(machine)) is not None:
            return Availability(usable=False, reason=reason)
        is_hopper = machine.compute_capability is not None and machine.compute_capability[0] == 9
        return _installation(NEEDED_ON_HOPPER if is_hopper else NEEDED, machine)

    def refuses(self, problem: LinearAttentionProblem) -> str | None:
        """Other devices than a GPU, other dtypes than bfloat16, and head dims that FLA asserts against."""
        if problem.device != "cuda":
            return f"it computes on NVIDIA GPUs only, not on {problem.device!r}"
        if problem.dtype == "float16":
            return "its gradients become NaN in float16"
        if problem.dtype == "float32":
            return "its products of float32 are TF32, right to three digits"
        if problem.key_dim > LARGEST_KEY_DIM:
            return f"its key heads have {LARGEST_KEY_DIM} dims at most, these have {problem.key_dim}"
        if problem.key_dim % 2 or problem.value_dim % 2:
            # fla.ops.common.chunk_o.chunk_bwd_dv
            return f"odd head dims are miscompiled in 16 bits: {problem.key_dim} and {problem.value_dim}"
        return None

    def saved_tensors(self, problem: LinearAttentionProblem) -> dict[str, int]:
        """What ``ChunkGatedDeltaRuleFunction`` saves (fla.ops.gated_delta_rule.chunk, version 0.6).

        Query, key and value are copies: they are normalised, or made contiguous.
        """
        tokens, item = sum(problem.lengths), _ITEM_BYTES[problem.dtype]
        values = tokens * problem.value_heads
        return {
            "query, key": 2 * tokens * problem.key_heads * (problem.key_dim * item + _FLOAT32),
            "value": values * problem.value_dim * item,
            "decay, beta": values * (_FLOAT32 + item),
            "A": values * _CHUNK * item,
        }

    def workspace(self, problem: LinearAttentionProblem) -> Workspace:
        """What the functions there and in fla.ops.common have at once: nothing of theirs goes before they end."""
        tokens, item = sum(problem.lengths), _ITEM_BYTES[problem.dtype]
        wide = tokens * problem.value_heads * problem.key_dim * item
        values = tokens * problem.value_heads * problem.value_dim * item
        chunks = sum(-(-length // _CHUNK) for length in problem.lengths)
        states = chunks * problem.value_heads * problem.key_dim * problem.value_dim * item
        narrow = tokens * problem.key_heads * problem.key_dim * item
        # w, u, the states and the new values; the copies of query and key that are normalised.
        forward = wide + 2 * values + states + 2 * narrow
        # The output's gradient laid out, w, u, new values and their gradients; the gradient of key in two parts,
        # and those of query and key for every value head.
        is_grouped = problem.key_heads != problem.value_heads
        of_decay = 2 * tokens * problem.value_heads * _FLOAT32
        backward = (3 + 2 * is_grouped) * wide + 4 * values + 2 * states + of_decay
        return Workspace(forward, backward)

    def short_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        layout: SequenceLayout,
        activation: str | None = "silu",
        initial_state: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Convolve by :func:`qwenft.kernels.fla.fla_short_conv`, whose arguments these are."""
        from qwenft.kernels.fla import fla_short_conv

        return fla_short_conv(
            x,
            weight,
            bias,
            layout=layout,
            activation=activation,
            initial_state=initial_state,
            return_state=return_state,
        )

    def delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        *,
        layout: SequenceLayout,
        initial_state: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run :func:`qwenft.kernels.fla.fla_delta_rule`, whose arguments these are."""
        from qwenft.kernels.fla import fla_delta_rule

        return fla_delta_rule(
            query,
            key,
            value,
            log_decay,
            beta,
            layout=layout,
            initial_state=initial_state,
            return_state=return_state,
        )


def _installation(needed: tuple[_Needed, ...], machine: Machine) -> Availability:
    """Whether all that is needed is installed, and new enough."""
    for need in needed:
        found = installed(need.distribution, machine)
        if found is None:
            reason = f"{need.distribution} is not installed"
            return Availability(usable=False, reason=reason, remedy='pip install "qwenft[cuda]"')
        if found < Version(need.oldest):
            reason = f"it needs {need.distribution} {need.oldest} or newer, found {found}: {need.why}"
            remedy = f'pip install "{need.distribution}>={need.oldest}"'
            return Availability(usable=False, reason=reason, remedy=remedy)
    return Availability(usable=True)
