"""The tensors of the gated delta rule that are known before any state is, for all chunks of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from qwenft.kernels.checks import compute_dtype
from qwenft.kernels.reference import EPSILON

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qwenft.kernels.chunks import Group

# Sums of log_decay are kept as a multiple of this and a rest, so that differences of large sums stay exact.
COARSE = 1 / 16


@attrs.frozen(eq=False)
class ChunkTensors:
    """What both passes need of a group's chunks, before any state is known.

    Args:
        q: [B, K, C, D], normalised and scaled.
        k: [B, K, C, D], normalised.
        v: [B, V, C, E].
        beta: [B, V, C].
        q_factor: [B, K, C, 1], which made q of the query.
        k_factor: [B, K, C, 1], which made k of the key.
        from_start: [B, V, C], exp(c): the decay from the chunk's start to each token.
        to_end: [B, V, C], exp(c_C - c): the decay from each token to the chunk's end.
        whole: [B, V, 1], exp(c_C).
        decay: [B, V, C, C], 1 on the diagonal and 0 above it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    q_factor: Tensor
    k_factor: Tensor
    from_start: Tensor
    to_end: Tensor
    whole: Tensor
    decay: Tensor

    @classmethod
    def cut(cls, inputs: Sequence[Tensor], group: Group) -> ChunkTensors:
        """Cut query, key, value, log_decay and beta, normalise and decay them."""
        dtype = compute_dtype(inputs[2])
        # Behind a document's end nothing may decay or be written; what else stands there meets zeros.
        q, k, v = (group.gather(tensor, dtype, zeroed=False) for tensor in inputs[:3])
        log_decay, beta = (group.gather(tensor, dtype, zeroed=True) for tensor in inputs[3:])
        q_factor = torch.rsqrt((q * q).sum(-1, keepdim=True) + EPSILON) * q.shape[-1] ** -0.5
        k_factor = torch.rsqrt((k * k).sum(-1, keepdim=True) + EPSILON)
        # Multiples of COARSE add up exactly and the rests stay small, so c_i - c_j is exact to float32's relative
        # precision even where the sums are in the thousands; one running sum would lose 1e-4 there.
        coarse = (log_decay / COARSE).round() * COARSE
        fine = (log_decay - coarse).cumsum(-1)
        coarse = coarse.cumsum(-1)
        decay = (coarse[..., :, None] - coarse[..., None, :]).add_(group.later)
        decay = decay.add_(fine[..., :, None]).sub_(fine[..., None, :]).exp_()
        from_start = (coarse + fine).exp_()
        return cls(
            q=q * q_factor,
            k=k * k_factor,
            v=v,
            beta=beta,
            q_factor=q_factor,
            k_factor=k_factor,
            from_start=from_start,
            to_end=decay[..., -1, :].contiguous(),
            whole=from_start[..., -1:],
            decay=decay,
        )

    @property
    def rows(self) -> int:
        """B * V, the batch of the products over value heads."""
        return self.v.shape[0] * self.v.shape[1]

    def scaled(self, x: Tensor, factor: Tensor, first: int = 0) -> Tensor:
        """The rows of q or k, one copy a value head, times [B, V, C]: [B V, C, D]; from chunk ``first`` on."""
        C, D = x.shape[2:]
        shared = factor.shape[1] // x.shape[1]
        return (x[first:, :, None] * factor[first:].unflatten(1, (-1, shared))[..., None]).view(-1, C, D)

    def products(self, x: Tensor) -> Tensor:
        """decay_ij (x_i . k_j) of q or k: [B, V, C, C]."""
        B, K, C, _ = x.shape
        dots = torch.matmul(x, self.k.mT)
        return (self.decay.view(B, K, -1, C, C) * dots[:, :, None]).view(B, -1, C, C)

    def over_values(self, x: Tensor) -> Tensor:
        """[B V, C, X] summed over the value heads that share a key head: [B, K, C, X]."""
        K, shared = self.k.shape[1], self.v.shape[1] // self.k.shape[1]
        return x.view(-1, K, shared, *x.shape[1:]).sum(2)

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Row by row dots of [B V, C, D] with q or k: [B, V, C]."""
        return (x.view(len(y), y.shape[1], -1, *y.shape[2:]) * y[:, :, None]).sum(-1).flatten(1, 2)
