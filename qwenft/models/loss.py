"""Cross entropy on supervised tokens, in chunks, without logits for the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qwenft.data.masking import IGNORED

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOGIT_BYTES = 64 * 2**20  # float32 logits of one chunk


@attrs.frozen
class _Terms:
    """What is added to plain cross entropy."""

    smoothing: float
    z: float


def supervised_loss(
    hidden: torch.Tensor,
    head: Any,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The weighted sum of the cross entropies of the supervised tokens.

    The same as the following, with logits for supervised positions alone, a chunk at a time::

        logits = head(hidden).float()
        each = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        ((each + z_loss * logits.logsumexp(-1) ** 2) * weights)[labels != -100].sum()

    Args:
        hidden: [T, H].
        head: the output head, a Linear without bias or a peft layer around one.
        labels: [T], aligned with the position that predicts; -100 where not trained.
        weights: [T], 1 everywhere where None.
        label_smoothing: the share of each target that is spread over the vocabulary.
        z_loss: the factor on the squared log of the softmax's sum.

    Returns:
        A float32 scalar with its graph; 0 with a zero gradient where nothing is supervised.
    """
    terms = _Terms(label_smoothing, z_loss)
    kept = _supervised(hidden, labels, weights)
    if isinstance(head, torch.nn.Linear):
        kept_SH, kept_labels, kept_weights = kept
        return _ChunkedLoss.apply(kept_SH, head.weight, kept_labels, kept_weights, terms)
    total = hidden.new_zeros((), dtype=torch.float32) + 0.0 * hidden[:1].float().sum()
    for part in _chunks(len(kept[0]), head.out_features):
        # A head with an adapter is a module like any other: its logits are computed again in backward.
        rows = (tensor[part] for tensor in kept)
        total = total + checkpoint(_chunk_loss, head, terms, *rows, use_reentrant=False)
    return total


@torch.no_grad()
def token_scores(
    hidden: torch.Tensor, head: Any, labels: torch.Tensor, weights: torch.Tensor | None = None
) -> tuple[float, float]:
    """What evaluation adds up: the negative log-likelihood of supervised tokens, and how many are the likeliest.

    Args:
        hidden: [T, H].
        head: the output head.
        labels: [T], as for :func:`supervised_loss`.
        weights: [T], 1 everywhere where None.

    Returns:
        Two weighted sums over the supervised tokens.
    """
    kept_SH, kept_labels, kept_weights = _supervised(hidden, labels, weights)
    loss = correct = 0.0
    for part in _chunks(len(kept_labels), head.out_features):
        logits = head(kept_SH[part]).float()
        each = F.cross_entropy(logits, kept_labels[part], reduction="none")
        loss += float((each * kept_weights[part]).sum())
        correct += float(((logits.argmax(dim=-1) == kept_labels[part]) * kept_weights[part]).sum())
    return loss, correct


def _supervised(
    hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [S, H], labels [S] and float32 weights [S] of the supervised positions."""
    rows = (labels != IGNORED).nonzero()[:, 0]
    kept_weights = torch.ones_like(rows, dtype=torch.float32) if weights is None else weights[rows].float()
    return hidden[rows], labels[rows], kept_weights


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, _LOGIT_BYTES // (4 * vocabulary))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _chunk_loss(
    head: Any, terms: _Terms, hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    logits = head(hidden).float()
    each = F.cross_entropy(logits, labels, reduction="none", label_smoothing=terms.smoothing)
    if terms.z:
        each = each + terms.z * logits.logsumexp(dim=-1).square()
    return (each * weights).sum()


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradient of each chunk together, so that no logits outlive it.

    With logits z, n = logsumexp(z), p = softmax(z), V words, smoothing e and z-loss c, a token's loss is
    n - (1 - e) z[label] - e mean(z) + c n^2, and d loss / dz = (1 + 2 c n) p - (1 - e) onehot(label) - e / V, from
    which the gradients of h and W follow by the two products of a Linear's backward.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd knows positional arguments alone
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        terms: _Terms,
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
            each = normaliser - (1 - terms.smoothing) * logits.gather(1, target) + terms.z * normaliser.square()
            if terms.smoothing:
                each -= terms.smoothing * logits.mean(dim=-1, keepdim=True)
            total += (each[:, 0] * weights[part]).sum()
            if not (wants_hidden or wants_weight):
                continue
            grad = logits.sub_(normaliser).exp_()
            if terms.z:
                grad *= 1 + 2 * terms.z * normaliser
            if terms.smoothing:
                grad -= terms.smoothing / len(weight)
            grad.scatter_add_(1, target, torch.full_like(target, terms.smoothing - 1, dtype=grad.dtype))
            grad = grad.mul_(weights[part, None]).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, cast, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            # float32: autograd casts it to what the weight's gradient is held in.
            None if grad_weight is None else grad_weight * grad,
            None,
            None,
            None,
        )
