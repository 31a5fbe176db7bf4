"""Cross entropy on supervised tokens, in chunks, without logits for the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qwenft.data.masking import IGNORED

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOGIT_BYTES = 64 * 2**20  # float32 logits of one chunk


def supervised_loss(
    hidden: torch.Tensor, head: Any, labels: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The weighted sum of the negative log-likelihoods of the supervised tokens.

    The same as ``(F.cross_entropy(head(hidden).float(), labels, reduction="none") * weights).sum()`` over
    positions whose label is not -100, with logits for these alone, a chunk at a time.

    Args:
        hidden: [T, H].
        head: the output head, a Linear without bias or a peft layer around one.
        labels: [T], aligned with the position that predicts; -100 where not trained.
        weights: [T], 1 everywhere where None.

    Returns:
        A float32 scalar with its graph; 0 with a zero gradient where nothing is supervised.
    """
    rows = (labels != IGNORED).nonzero()[:, 0]
    kept_SH, kept_labels = hidden[rows], labels[rows]
    kept_weights = torch.ones_like(rows, dtype=torch.float32) if weights is None else weights[rows].float()
    if isinstance(head, torch.nn.Linear):
        return _ChunkedLoss.apply(kept_SH, head.weight, kept_labels, kept_weights)
    total = hidden.new_zeros((), dtype=torch.float32) + 0.0 * hidden[:1].float().sum()
    for part in _chunks(len(rows), head.out_features):
        # A head with an adapter is a module like any other: its logits are computed again in backward.
        total = total + checkpoint(
            _chunk_loss, kept_SH[part], head, kept_labels[part], kept_weights[part], use_reentrant=False
        )
    return total


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, _LOGIT_BYTES // (4 * vocabulary))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _chunk_loss(hidden: torch.Tensor, head: Any, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (F.cross_entropy(head(hidden).float(), labels, reduction="none") * weights).sum()


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradient of each chunk together, so that no logits outlive it.

    With logits z = h W^T and p = softmax(z): d loss / dz = weight (p - onehot(label)), from which the gradients
    of h and W follow by the two products of a Linear's backward.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        cast = weight.to(hidden.dtype)
        for part in _chunks(len(labels), len(weight)):
            logits = (hidden[part] @ cast.T).float()
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            target = labels[part, None]
            total += ((normaliser - logits.gather(1, target))[:, 0] * weights[part]).sum()
            if not (wants_hidden or wants_weight):
                continue
            grad = logits.sub_(normaliser).exp_()
            grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
            grad = grad.mul_(weights[part, None]).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, cast, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
        )
