"""Norms and gated MLPs of a model through kernels that keep less for backward than transformers' compositions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.activations import ACT2FN
from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

from qwenft.kernels.elementwise import rms_norm, swiglu
from qwenft.kernels.made_again import made_again

if TYPE_CHECKING:
    import torch


class _Norm:
    """The zero-centred norm of the family: its weight is what is added to one."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """[..., H] to [..., H]."""
        return rms_norm(x, 1.0 + self.weight.float(), self.eps)


class _GatedNorm:
    """The norm of Gated DeltaNet, gated by SiLU."""

    def forward(self: Any, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """[R, E] and its gate [R, E] to [R, E]."""
        return rms_norm(hidden_states, self.weight.float(), self.variance_epsilon, gate=gate)


class _MLP:
    """The SwiGLU of dense layers and of the shared expert."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """[..., H] to [..., H]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = swiglu(gate, up)
        with made_again(product, lambda: swiglu(gate.detach(), up.detach())):
            return self.down_proj(product)


class Norm(_Norm, dense.Qwen3_5RMSNorm):
    """Of a dense model."""


class MoeNorm(_Norm, moe.Qwen3_5MoeRMSNorm):
    """Of a mixture of experts."""


class GatedNorm(_GatedNorm, dense.Qwen3_5RMSNormGated):
    """Of a dense model."""


class MoeGatedNorm(_GatedNorm, moe.Qwen3_5MoeRMSNormGated):
    """Of a mixture of experts."""


class MLP(_MLP, dense.Qwen3_5MLP):
    """Of a dense model."""


class MoeMLP(_MLP, moe.Qwen3_5MoeMLP):
    """The shared expert."""


_SILU = ACT2FN["silu"]
_FUSED: dict[type, Any] = {
    dense.Qwen3_5RMSNorm: Norm,
    moe.Qwen3_5MoeRMSNorm: MoeNorm,
    dense.Qwen3_5RMSNormGated: GatedNorm,
    moe.Qwen3_5MoeRMSNormGated: MoeGatedNorm,
    dense.Qwen3_5MLP: MLP,
    moe.Qwen3_5MoeMLP: MoeMLP,
}


def fuse_elementwise(model: Any) -> Any:
    """Give this model's norms and MLPs their kernels, in place; no other model is touched.

    Args:
        model: a Qwen3.5 model of transformers; an MLP of another activation than SiLU is left as it is.

    Returns:
        The model.
    """
    for module in model.modules():
        fused = _FUSED.get(type(module))
        if fused is not None and type(getattr(module, "act_fn", _SILU)) is type(_SILU):
            module.__class__ = fused
    return model
